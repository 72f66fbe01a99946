"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): learned keys and values in front of every layer's own.

softmax(Q [P_k; K]^T / sqrt(d)) [P_v; V]. The parameters and the file are peft's PREFIX_TUNING; the computation
goes through our attention port (attention.py), because peft's goes through the cache, which excludes gradient
checkpointing and crashes on models with multi-axis rotary positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import Method, MethodOptions

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig


class PrefixOptions(MethodOptions):
    """Options of `prefix`; the length is the paper's. Its place is always the attention."""

    virtual_tokens: int = Field(default=20, ge=1)
    """Learned keys and values in each layer."""
    projection: bool = False
    """Train through a two-layer MLP (tanh between) that is baked into the table when saved."""
    projection_width: int | None = Field(default=None, ge=1)
    """Inner width of that MLP; None is the model's width."""
    init_std: float = Field(default=0.02, gt=0)
    """Spread of the normal distribution that the learned table starts from."""


class Prefix(Method[PrefixOptions]):
    """Learned keys and values, joined after rotary positions and cache."""

    Options = PrefixOptions
    learning_rate = 1e-5
    size = "virtual_tokens"

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """Peft's PrefixTuningConfig; peft fills in the model's layers, heads and widths."""
        from peft import PrefixTuningConfig

        if self.options.projection_width and not self.options.projection:
            from peft_mllm.errors import MethodError

            raise MethodError("prefix: projection_width has no effect without projection: true.")
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.options.virtual_tokens,
            prefix_projection=self.options.projection,
            encoder_hidden_size=self.options.projection_width or config.hidden_size,
        )

    def initialise(self, model: PeftModel, anatomy: Anatomy) -> None:
        """Start from N(0, init_std): peft's own N(0, 1) drowns the text's keys."""
        import torch

        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=self.options.init_std)
