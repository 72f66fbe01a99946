"""The gate before any speed: over twenty steps, losses and gradients equal those of each peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.case import Case
from benchmarks.ours import rehearse
from benchmarks.seen import Seen, gradient_difference
from benchmarks.turns import Side

STEPS = 20
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference that is rounding."""


@dataclass(frozen=True)
class Equality:
    """The greatest relative differences over the steps.

    Attributes:
        loss: of the step's mean loss.
        gradient: of all gradients together, in their norm.
        limit: what both may be.
        steps: compared.
    """

    loss: float
    gradient: float
    limit: float
    steps: int

    @property
    def passed(self) -> bool:
        """Whether the two compute the same; false for what is not a number."""
        return self.loss <= self.limit and self.gradient <= self.limit


def compare(case: Case, peers: Sequence[Callable[..., Side]], *, steps: int = STEPS) -> dict[str, Equality]:
    """Train the same samples in the same steps with each; the case's data has `steps` steps.

    Returns:
        peer's name -> how far it is from ours.
    """
    mine, order = rehearse(case, steps=steps)
    found = {}
    for make in peers:
        seen = Seen()
        side = make(case, order=order, seen=seen)
        side.train(lambda: None)
        found[side.name] = equality(mine, seen, LIMIT[torch.bfloat16 if case.bf16 else torch.float32])
    return found


def equality(ours: Seen, theirs: Seen, limit: float) -> Equality:
    """How far two trainings of as many steps are apart."""
    losses = [abs(a - float(b)) / abs(float(b)) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    gradients = [gradient_difference(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True)]
    return Equality(max(losses), max(gradients), limit, len(losses))
