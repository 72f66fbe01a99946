"""The self-check: on the model and data in hand, trees give the losses and gradients of samples one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import Batch, collate, collate_padded, plant
from peft_mllm.record import Record
from peft_mllm.tuned import Tuned

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference of gradients that is rounding, by the type of the computation."""
LOOKED_AT = 64
"""Records in which the self-check looks for some that share their images."""


@dataclass(frozen=True)
class SelfCheck:
    """The relative differences between the shared and the plain computation.

    Attributes:
        samples: how many were compared.
        shared_tokens: tokens that sharing saved.
        loss: of the mean loss.
        gradient: of the gradient of everything that trains, in the norm of all of it together.
        tolerance: what `gradient` may be.
    """

    samples: int
    shared_tokens: int
    loss: float
    gradient: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether sharing is exact here; false for a difference that is not a number."""
        return self.gradient <= self.tolerance


def telling(records: Sequence[Record], count: int) -> list[Record]:
    """Up to `count` records to compare: first those that share their images with another, where there are such."""
    looked_at = [records[i] for i in range(min(LOOKED_AT, len(records)))]
    keys = [tuple(image.key for image in record.images) for record in looked_at]
    shares = [bool(key) and keys.count(key) > 1 for key in keys]
    order = sorted(range(len(looked_at)), key=lambda i: not shares[i])
    return [looked_at[i] for i in order[:count]]


def self_check(tuned: Tuned, samples: Sequence[Sample], *, pad_id: int) -> SelfCheck | None:
    """Compare losses and gradients of samples as trees with those of the same samples padded, dropout off.

    None where the plain computation is not finite: training then stops at those samples, and names them.
    """
    trees = plant(samples, share=True)
    plain = collate_padded(samples, pixels=tuned.family.pixels, pad_id=pad_id)
    shared = collate(trees, pixels=tuned.family.pixels, pad_id=pad_id)
    tuned.model.eval()
    loss, gradient = _loss_and_gradient(tuned, shared)
    plain_loss, plain_gradient = _loss_and_gradient(tuned, plain)
    if not (math.isfinite(plain_loss) and plain_gradient.isfinite().all()):
        return None
    size = plain_gradient.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return SelfCheck(
        samples=len(samples),
        shared_tokens=plain.tokens - shared.tokens,
        loss=abs(loss - plain_loss) / abs(plain_loss),
        gradient=((gradient - plain_gradient).norm() / size).item(),
        tolerance=TOLERANCE[torch.bfloat16 if tuned.bf16 else torch.float32],
    )


def _loss_and_gradient(tuned: Tuned, batch: Batch) -> tuple[float, Tensor]:
    parameters = list(tuned.trainable().values())
    loss = tuned.answer_losses(batch.to(tuned.device)).mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [
        torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)
    ]
    return loss.item(), torch.cat(flat)
