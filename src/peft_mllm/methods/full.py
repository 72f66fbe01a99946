"""Full fine-tuning of the language model: the ceiling of a comparison. Connector and tower have their own switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_mllm.anatomy import Anatomy
from peft_mllm.methods.base import Method, MethodOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Full(Method[MethodOptions]):
    """Trains every parameter of the language model and its head."""

    learning_rate = 2e-5

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> None:
        """There is none: the model's own parameters train."""
        return

    def trains(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The decoder stack with its embeddings, and the head."""
        return anatomy.llm, anatomy.lm_head
