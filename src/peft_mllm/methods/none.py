"""No method: the base as it is (the floor of a comparison), or with only its connector or vision tower tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import Method, MethodOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class NoMethod(Method[MethodOptions]):
    """Leaves the language model frozen."""

    learning_rate = 2e-5
    tunes_llm = False

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> None:
        """There is none."""
        return
