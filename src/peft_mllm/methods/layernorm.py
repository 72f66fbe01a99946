"""LayerNorm tuning (Zhao et al. 2024, arXiv 2312.11420): train the decoder's normalisations, and nothing else.

y = x / rms(x) * g, with g trained from the value it has; peft's implementation, which replaces whole modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import LocatedOptions, Method

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig


class LayerNormOptions(LocatedOptions):
    """Options of `layernorm`: it has no size."""


class LayerNorm(Method[LayerNormOptions]):
    """The normalisations before attention (attention), and before each MLP and after the last one (mlp)."""

    Options = LayerNormOptions
    learning_rate = 2e-4  # as ia3, its nearest relative: both rescale what is there

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """Peft's LNTuningConfig on the normalisations of the location."""
        from peft import LNTuningConfig

        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=anatomy.norm_pattern(self.options.location))
