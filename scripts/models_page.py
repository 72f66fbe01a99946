"""Makes the tables of docs/models.md: what each method trains on the study's models, and the memory that it needs.

    python scripts/models_page.py            # writes them between the page's marks
    python scripts/models_page.py --check    # changes nothing; exits 1 if the page is out of date

The models are built from their published configurations without weights; the methods are attached to them as a
run would attach them. No figure stands in this file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from peft_mllm.methods import METHODS
from peft_mllm.models import MODELS, Family
from peft_mllm.tuned import FROZEN_COPY, attach

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SHOWN = ("lora", "ia3", "adapter", "prefix", "full")
GIB = 2**30
HELD, TRAINED = 2, 16
"""Bytes of a parameter: bfloat16 where it is frozen; float32 with gradient and Adam's two moments where it trains."""


def llava(hidden: int, inner: int, layers: int, heads: int) -> Any:
    """LLaVA-1.5 and ShareGPT4V: CLIP ViT-L/14 at 336 pixels and a Vicuna of this size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=1024, image_size=336, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_index=258))


def qwen_vl() -> Any:
    """Qwen-VL-Chat: the configuration's defaults are its own."""
    from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
    from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration

    return QwenVLForConditionalGeneration(QwenVLConfig())


MODELS_SHOWN: dict[str, tuple[str, Callable[[], Any]]] = {
    "LLaVA-1.5-7B": ("llava", lambda: llava(4096, 11008, 32, 32)),
    "LLaVA-1.5-13B": ("llava", lambda: llava(5120, 13824, 40, 40)),
    "ShareGPT4V-7B": ("llava", lambda: llava(4096, 11008, 32, 32)),
    "Qwen-VL-Chat": ("qwen_vl", qwen_vl),
}


def without_weights(family: str, make: Callable[[], Any]) -> Family:
    """A family around a model on the meta device; there is nothing to read text or images with."""
    with torch.device("meta"):
        model = make()
    kind = MODELS[family]
    made: Any = SimpleNamespace(model=model, anatomy=kind.anatomy, trees=True, is_twin=False)
    kind.anatomy.check(model)
    return made  # type: ignore[no-any-return]


def row(name: str, method: str, connector: bool) -> str:
    """One line of the table."""
    family, make = MODELS_SHOWN[name]
    kind = METHODS[method]
    with torch.device("meta"):
        tuned = attach(without_weights(family, make), kind(kind.Options()), connector=connector)
    sizes = [(p.requires_grad, FROZEN_COPY in n, p.numel()) for n, p in tuned.model.named_parameters()]
    trained = sum(size for trains, _, size in sizes if trains)
    held = sum(size for trains, _, size in sizes if not trains)
    memory = (held * HELD + trained * TRAINED) / GIB
    opened = "tuned" if connector else "frozen"
    return f"| {name} | {method} | {opened} | {trained:,} | {memory:.1f} GiB |"


def table() -> str:
    """All models, methods and connector settings."""
    head = [
        "| Model | Method (default options) | Connector | Trained parameters | Memory |",
        "|---|---|---|---:|---:|",
    ]
    rows = [row(*each) for each in product(MODELS_SHOWN, SHOWN, (False, True))]
    return "\n".join(head + rows)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after, blocks = re.subn(
        r"(<!-- memory:begin -->\n).*?(\n<!-- memory:end -->)",
        lambda found: f"{found[1]}{table()}{found[2]}",
        before,
        flags=re.DOTALL,
    )
    if blocks != 1:
        sys.exit(f"{PAGE} must have one block between <!-- memory:begin --> and <!-- memory:end -->.")
    if check and after != before:
        sys.exit(f"{PAGE} is out of date. Run: python scripts/models_page.py")
    if after != before:
        PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
