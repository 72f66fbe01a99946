"""IA3 (Liu et al. 2022, arXiv 2205.05638): learned vectors that scale keys, values and the MLP's inner activations.

softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), and (l_ff * act) W_down, all starting at one; peft's implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import LocatedOptions, Method, targets

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

# A family with fused query, key and value cannot scale k and v alone: the released code then scales the
# attention's output projection (and so does this).
ATTENTION = ("k", "v")
FUSED_ATTENTION = ("o",)
MLP = ("down",)


class IA3Options(LocatedOptions):
    """Options of `ia3`: it has no size."""


class IA3(Method[IA3Options]):
    """Scaling vectors on keys and values (attention) and before the down projection (mlp)."""

    Options = IA3Options
    learning_rate = 2e-4

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """Peft's IA3Config: k and v scale their output, down its input."""
        from peft import IA3Config

        attention = ATTENTION if "k" in anatomy.attention else FUSED_ATTENTION
        here = {"attention": attention, "mlp": MLP, "both": attention + MLP}[self.options.location]
        feedforward: str | list[str] | None = anatomy.pattern(MLP) if self.options.location != "attention" else []
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=targets(anatomy, here, wanted=f"ia3 at {self.options.location}"),
            feedforward_modules=feedforward,
        )
