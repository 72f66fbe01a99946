"""What was found where a quicker way to answer was held against the plain one, on the model and prompts in hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """The difference of the two, once.

    Attributes:
        difference: relative, of the logits in their norm; None where there is none to tell.
        tolerance: what it may be: rounding.
        why: there is none; empty where there is.
    """

    difference: float | None
    tolerance: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the quicker way is exact here."""
        return self.difference is not None and self.difference <= self.tolerance
