"""The fresh process of a seal: load a directory as somebody else would, and answer the probe.

    python -P reload.py REQUEST.json

It is run as a file, so that nothing of ours is imported unless the request says that it is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(request: dict[str, Any]) -> Any:
    """The model of a request, in evaluation mode, on the CPU or where our own loader puts it."""
    if request["by"] == "ours":
        return _load_with_ours(request)
    if request["by"] == "taught":
        import peft_mllm  # noqa: F401
    from transformers import AutoModelForImageTextToText

    options = {"dtype": request["dtype"], "attn_implementation": request["attn_implementation"]}
    model = AutoModelForImageTextToText.from_pretrained(request["source"], **options)
    if request["adapter"] is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, request["adapter"])


def _load_with_ours(request: dict[str, Any]) -> Any:
    from peft_mllm.loading import load_family
    from peft_mllm.spec import ModelSpec
    from peft_mllm.tuned import load_adapter

    family = load_family(ModelSpec.model_validate(request["model"]), dtype=request["dtype"])
    if request["adapter"] is None:
        return family.model
    tuned = load_adapter(family, request["adapter"])
    return tuned.model if request["in_peft_model"] else tuned.base


@torch.no_grad()
def answer(model: Any, asked: dict[str, torch.Tensor], *, device: str, bf16: bool) -> torch.Tensor:
    """Logits (n, V) of one conversation, at its columns; virtual tokens may stand in front of the text."""
    inputs = {name: tensor.to(device) for name, tensor in asked.items() if name != "columns"}
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        logits = model(**inputs).logits[0]
    widened = logits.shape[0] - asked["input_ids"].shape[1]
    return logits[asked["columns"].to(device) + widened].float().cpu().contiguous()


def main() -> None:
    """Answer the request that the command line names."""
    request = json.loads(Path(sys.argv[1]).read_bytes())
    torch.set_num_threads(request["threads"])
    model = load(request).to(request["device"]).eval()
    answers = {
        name: answer(model, load_file(file), device=request["device"], bf16=request["bf16"])
        for name, file in request["asked"].items()
    }
    save_file(answers, request["answers"])


if __name__ == "__main__":
    main()
