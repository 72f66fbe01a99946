"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + alpha/r * B A, with B = 0 at the start; peft's implementation.

Variants by option: rsLoRA (arXiv 2312.03732, alpha/sqrt(r)), DoRA (2402.09353, magnitude and direction apart),
PiSSA (2404.02948, A and B start as the principal singular directions of W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import LocatedOptions, Method, targets

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig


class LoRAOptions(LocatedOptions):
    """Options of `lora`; the defaults are the paper's and its released code's."""

    rank: int = Field(default=128, ge=1)
    """r, the inner width of the update."""
    alpha: float = Field(default=256, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """On the update's input, in training."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    dora: bool = False
    """Train magnitude and direction apart."""
    init: Literal["default", "gaussian", "pissa"] = "default"
    """How A and B start; pissa also moves W, so it needs the base it was trained on, bit for bit."""


class LoRA(Method[LoRAOptions]):
    """Low-rank updates of the decoder's linears: by default all seven of every layer."""

    Options = LoRAOptions
    learning_rate = 2e-4
    size = "rank"

    def sized(self, size: int) -> dict[str, object]:
        """Another rank, with alpha in proportion."""
        return {"rank": size, "alpha": self.options.alpha / self.options.rank * size}

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """Peft's LoraConfig on the linears of the location."""
        from peft import LoraConfig

        roles = tuple(anatomy.roles(self.options.location))
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            use_rslora=self.options.rslora,
            use_dora=self.options.dora,
            init_lora_weights=True if self.options.init == "default" else self.options.init,
            target_modules=targets(anatomy, roles, wanted=f"lora at {self.options.location}"),
        )
