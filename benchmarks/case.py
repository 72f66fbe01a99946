"""One comparison: a model, a workload and a method, and how each trainer is to take its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import Base
from peft_mllm.methods import METHODS
from peft_mllm.methods.base import Method
from peft_mllm.seeds import derive
from peft_mllm.spec import NamedSpec
from peft_mllm.specfile import build

if TYPE_CHECKING:
    from peft_mllm.tuned import Tuned

SEED = 42
RATE = 1e-4
FOREVER = 1_000_000
"""Steps of a timed training: it is ended from outside."""


@dataclass(frozen=True)
class Case:
    """What all trainers of one comparison have in common.

    Attributes:
        base: the model without a method.
        data: messages JSONL.
        step: samples of a step.
        method: name on our shelf; its options are the shape's.
        folder: where runs may write.
    """

    base: Base
    data: Path
    step: int
    method: str
    folder: Path

    @property
    def bf16(self) -> bool:
        """Whether this is computed in bfloat16."""
        return self.base.bf16

    @property
    def options(self) -> dict[str, Any]:
        """The method's name and options, as in a spec."""
        return {"name": self.method, **self.base.shape.methods[self.method]}

    def attach(self) -> Tuned:
        """The method on a twin of the base, with the same start whenever it is called."""
        import torch

        from peft_mllm.tuned import attach

        method: Method[Any] = build(METHODS, NamedSpec.model_validate(self.options))
        torch.manual_seed(derive(SEED, "init"))
        return attach(self.base.twin(), method, bf16=self.bf16)
