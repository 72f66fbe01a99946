"""The self-check: on the model and data in hand, trees give the losses and gradients of samples one by one.

Likewise the logits of answers that are found in a quicker way (decoding.py, choices.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.attention import longest_path
from peft_mllm.data.encode import Sample
from peft_mllm.data.supply import Layout, Supply
from peft_mllm.data.trees import Batch, collate_padded, plant
from peft_mllm.errors import MethodError
from peft_mllm.lean import Levers, install, remove
from peft_mllm.pieces import held, in_pieces
from peft_mllm.proof import Proof
from peft_mllm.record import Record
from peft_mllm.spec import Spec
from peft_mllm.tuned import Tuned

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference of gradients that is rounding, by the type of the computation."""
OF_LOGITS = {torch.float32: 1e-5}
"""Of logits, likewise."""
COARSE = 5e-2
"""The same for types of half the width."""
ROUNDINGS = 4
"""A difference is rounding too where one rounding of the embeddings moves the plain gradient by a fourth of it."""
LOOKED_AT = 64
"""Records in which the self-check looks for some that share their images."""


WARNING = (
    "WARNING: on this model, {layout} do not give the gradients of samples one by one: they differ by {gradient:.1e}, "
    "where {tolerance:.0e} is rounding. They are not used in this run, which is right but slower. Please report this."
)
NOT_LEAN = (
    "WARNING: on this model, lean layers do not give the gradients of its own: they differ by {gradient:.1e}, where "
    "{tolerance:.0e} is rounding. They are not used in this run, which is right but takes memory. Please report this."
)
NOT_TOGETHER = (
    "WARNING: on this model, {what} do not give the logits of prompts one by one: they differ by {difference:.1e}, "
    "where {tolerance:.0e} is rounding. Answers are found one by one instead, which is right but slower. Please report "
    "this."
)
NOT_POSSIBLE = (
    "WARNING: on this model, {what} cannot be computed: {why}. Answers are found one by one instead, which is right "
    "but slower."
)
ANSWERED = {
    "decoding": "answers to an image's questions together",
    "choices": "trees of choices",
    "choices_of_text": "trees of choices without an image",
}
IN_WORDS = {"packed": "trees packed in one row", "rows": "samples that share an image's prefix"}


@dataclass(frozen=True)
class SelfCheck:
    """The relative differences between the shared and the plain computation.

    Attributes:
        samples: how many were compared.
        shared_tokens: tokens that sharing saved.
        loss: of the mean loss.
        gradient: of the gradient of everything that trains, in the norm of all of it together.
        tolerance: what `gradient` may be: rounding, as these weights make of it.
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


def layouts(tuned: Tuned, spec: Spec) -> list[Layout]:
    """The layouts that may do on a model, the quickest first; padded rows are what all are compared with."""
    reach = min(longest_path(tuned.decoder), tuned.family.reach or math.inf)
    packed = tuned.packs and spec.speed.attention == "auto" and spec.data.max_length <= reach
    possible: dict[Layout, bool] = {"packed": packed, "rows": tuned.trees, "padded": True}
    return [layout for layout, is_possible in possible.items() if is_possible]


def proven(
    tuned: Tuned, supply: Supply, samples: Sequence[Sample], among: Sequence[Layout], *, note: Callable[[str], None]
) -> tuple[Supply, SelfCheck | None]:
    """The supply in the first layout that is exact on these samples, and the proof; None where nothing is to be proven.

    Args:
        tuned: the model.
        supply: of the run, in any layout.
        samples: to compare.
        among: the layouts, the quickest first and `padded` last.
        note: told why a layout is not used.
    """
    check = None
    for layout in among:
        supply = replace(supply, layout=layout)
        if layout == "padded" or (layout == "rows" and not supply.share):
            break
        try:
            check = self_check(tuned, samples, supply)
        except MethodError as error:
            note(f"Trees are not packed in one row: {error}.")
            continue
        if check is None or check.passed:
            break
        note(WARNING.format(layout=IN_WORDS[layout], gradient=check.gradient, tolerance=check.tolerance))
    return supply, check


def self_check(tuned: Tuned, samples: Sequence[Sample], supply: Supply) -> SelfCheck | None:
    """Compare losses and gradients of samples as a supply lays them out with those of the same samples one by one.

    Dropout is off. None where the plain computation is not finite: training stops at those samples, and names them.

    Raises:
        MethodError: the model's attention cannot be computed in this layout; says why.
    """
    plain = [collate_padded([sample], pixels=supply.pixels, pad_id=supply.pad_id) for sample in samples]
    shared = supply.lay(plant(samples, share=supply.share))
    tuned.model.eval()
    found = _loss_and_gradient(tuned, [shared])
    saved = sum(batch.tokens for batch in plain) - shared.tokens
    return _compared(found, tuned, plain, samples=len(samples), shared_tokens=saved)


def lean_where_exact(
    tuned: Tuned, samples: Sequence[Sample], supply: Supply, levers: Levers, *, note: Callable[[str], None]
) -> SelfCheck | None:
    """Put lean layers on the model where they give its gradients on these samples; and the proof, where there is one.

    Args:
        tuned: the model.
        samples: to compare.
        supply: lays them out.
        levers: what is used.
        note: told why they are not.
    """
    batch = supply.lay(plant(samples, share=supply.share and supply.layout != "padded"))
    together = tuned.shards.put_together if tuned.shards else None
    lean = install(tuned.base, tuned.family.anatomy, levers, whole=together)
    if not lean.used:
        return None
    tuned.model.eval()
    found = _loss_and_gradient(tuned, [batch])
    with lean.paused():
        check = _compared(found, tuned, [batch], samples=len(samples), shared_tokens=0)
    if check is not None and not check.passed:
        remove(tuned.base, tuned.family.anatomy)
        note(NOT_LEAN.format(gradient=check.gradient, tolerance=check.tolerance))
    return check


@torch.no_grad()
def same_logits(tuned: Tuned, found: Tensor, plain: Batch) -> Proof:
    """Compare logits of answer tokens with those of plain rows; a constant added to all of a token's is nothing.

    Args:
        tuned: the model.
        found: (A, V).
        plain: the same answers, a sample in each row.
    """
    kind = torch.bfloat16 if tuned.bf16 else tuned.base.dtype
    tolerance = OF_LOGITS.get(kind, COARSE)
    expected, found = _centred(tuned.answer_logits(plain)), _centred(found)
    if not expected.isfinite().all():
        return Proof(None, tolerance, "its logits are not finite")
    off = _relative(found, expected)
    if off > tolerance:
        with _one_rounding(tuned):
            tolerance = max(tolerance, ROUNDINGS * _relative(_centred(tuned.answer_logits(plain)), expected))
    if not math.isfinite(off):
        return Proof(None, tolerance, "there its logits are not finite")
    return Proof(off, tolerance)


def tried(prove: Callable[[], Proof]) -> Proof:
    """A proof; that of a model which cannot be asked in this way says why."""
    try:
        return prove()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return Proof(None, 0.0, f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0].rstrip('.')}")


def doubt(name: str, proof: Proof) -> str:
    """What is said of a proof that failed."""
    said = NOT_POSSIBLE if proof.difference is None else NOT_TOGETHER
    return said.format(what=ANSWERED[name], **asdict(proof))


def _centred(logits: Tensor) -> Tensor:
    return logits.float() - logits.float().mean(dim=-1, keepdim=True)


def _compared(found: tuple[float, Tensor], tuned: Tuned, plain: Sequence[Batch], **counted: int) -> SelfCheck | None:
    """A loss and gradient beside those of the plain computation; None where that is not finite."""
    loss, gradient = found
    plain_loss, plain_gradient = _loss_and_gradient(tuned, plain)
    most = tuned.shards.most if tuned.shards else float  # each process may hold other pieces of a gradient
    if most(not (math.isfinite(plain_loss) and plain_gradient.isfinite().all())):
        return None
    off = most(_relative(gradient, plain_gradient))
    tolerance = TOLERANCE[torch.bfloat16 if tuned.bf16 else torch.float32]
    if off > tolerance:  # there are weights that make more of a rounding, however they are computed
        with _one_rounding(tuned):
            _, moved = _loss_and_gradient(tuned, plain)
        tolerance = max(tolerance, ROUNDINGS * most(_relative(moved, plain_gradient)))
    return SelfCheck(loss=abs(loss - plain_loss) / abs(plain_loss), gradient=off, tolerance=tolerance, **counted)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


@contextmanager
def _one_rounding(tuned: Tuned) -> Iterator[None]:
    """Until the context ends, move each number of the embeddings by about one rounding."""

    def move(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(embedded.shape, generator=generator).to(embedded.device)
        return (embedded * (1 + noise * torch.finfo(embedded.dtype).eps)).to(embedded.dtype)

    handle = tuned.base.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _loss_and_gradient(tuned: Tuned, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """The mean loss over all answer tokens and its gradient, one batch in memory at a time."""
    parameters = list(tuned.trainable().values())
    answers = sum(batch.answer_tokens for batch in batches)
    total, gradient = 0.0, torch.zeros(sum(held(p).numel() for p in parameters), device=tuned.device)
    for batch in batches:
        loss = tuned.answer_losses(batch.to(tuned.device)).sum() / answers
        gradient += torch.cat([each.flatten() for each in _gradients(loss, parameters)])
        total += loss.item()
    return total, gradient


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """As much of each gradient as this process holds of the parameter; of one in pieces, times the processes."""
    found: Sequence[Tensor | None]
    if not any(map(in_pieces, parameters)):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    else:  # a forward computes with other tensors than the pieces, which are given their gradient in the end
        loss.backward()
        found = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
    return [torch.zeros_like(held(p)) if g is None else held(g) for p, g in zip(parameters, found, strict=True)]
