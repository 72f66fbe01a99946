"""What a training did at each step, seen from outside: losses, and the gradients that its optimizer was given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

Gradients = dict[tuple[tuple[int, ...], int], Tensor]
"""By the parameter's shape, and its number among those of that shape: every trainer keeps their order."""


@dataclass
class Seen:
    """What one training did.

    Attributes:
        losses: of each step, where the trainer tells it.
        gradients: of each step.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)


_watched: dict[int, Seen] = {}
_hooked = threading.Lock()
_hook: list[Any] = []


@contextmanager
def watching(seen: Seen) -> Iterator[Seen]:
    """Until the context ends, see the steps of every optimizer in this thread."""
    with _hooked:
        if not _hook:
            _hook.append(register_optimizer_step_pre_hook(_before_step))
    _watched[threading.get_ident()] = seen
    try:
        yield seen
    finally:
        del _watched[threading.get_ident()]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    seen = _watched.get(threading.get_ident())
    if seen is None:
        return
    counted: dict[tuple[int, ...], int] = {}
    gradients: Gradients = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shape = tuple(parameter.shape)
            number = counted[shape] = counted.get(shape, -1) + 1
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[shape, number] = gradient.detach().to("cpu", torch.float32, copy=True)
    seen.gradients.append(gradients)


def gradient_difference(ours: Gradients, theirs: Gradients) -> float:
    """|ours - theirs| / |theirs|, in the norm of all gradients together; infinite where other parameters train."""
    if ours.keys() != theirs.keys():
        return float("inf")
    apart = sum(float((ours[key] - theirs[key]).double().square().sum()) for key in ours)
    size = sum(float(theirs[key].double().square().sum()) for key in theirs)
    return float((apart / size) ** 0.5)
