"""The gradients of several runs on one frozen base, in one forward and backward pass.

The packed rows of all runs lie one after the other in one row. Frozen linears, norms and rotary angles are computed
for all of it at once; each run's tuners, learned prefix and attention are for its own stretch, and so are its
embeddings, its connector and its head. What a run gets is what it gets by itself: on one CPU thread bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from peft_mllm.attention import Joined, LearnedOfSeveral, open_port, port_of
from peft_mllm.data.trees import NO_MASK, Batch
from peft_mllm.exactness import TOLERANCE
from peft_mllm.lean import Parts, Rows, generator_state, joined, layers_of, lean_of, parts_of, put_on, read_all, remove
from peft_mllm.memory.relief import is_out_of_memory
from peft_mllm.models import Family
from peft_mllm.proof import Proof
from peft_mllm.recompute import recompute_of
from peft_mllm.tuned import Tuned

GIVEN = ("inputs_embeds", "position_ids", "attention_mask", "cache_position")
"""What a base gives its decoder that can be joined; anything else must be absent or switched off."""
NAME = "together"
"""Of the proof, among a model's others."""
MOST_TOKENS = 4096
"""Computed at once for several runs: so many keep any device busy, and more would only take memory."""
NOT_AT_ONCE = "WARNING: these runs cannot be computed together ({why}), so each is by itself: right, but slower."
NOT_JOINED = (
    "WARNING: computed together with others, this run has not the gradients that it has alone: they differ by "
    "{difference:.1e}, where {tolerance:.0e} is rounding. It is computed by itself, which is right but slower. Please "
    "report this."
)


@dataclass(frozen=True)
class Asked:
    """What a run asks for: see `Tuned.add_gradients`.

    Attributes:
        tuned: the run's model.
        batch: on any device.
        seed: of its dropout.
        answers: that its losses are averaged over.
        limit: tokens that may be computed at once; None is any number.
    """

    tuned: Tuned
    batch: Batch
    seed: int
    answers: float
    limit: int | None = None

    def alone(self) -> Tensor:
        """Compute it by itself."""
        return self.tuned.add_gradients(self.batch, self.seed, self.answers)


@dataclass(frozen=True)
class Entering:
    """A run's batch as it enters the decoder.

    Attributes:
        asked: what it is for.
        batch: on the device.
        embedded: (1, T, D) tokens with images in them.
        positions: (1, T), or (P, 1, T) for several axes.
        draws: the generator's state in which its dropout goes on; None where it has none.
    """

    asked: Asked
    batch: Batch
    embedded: Tensor
    positions: Tensor
    draws: Tensor | None


class SharedBase:
    """A frozen base whose decoder computes for several runs at once.

    Args:
        family: a twin of the base, without a method; nobody else uses it.
        note: told where a run cannot be computed with the others.
    """

    def __init__(self, family: Family, *, note: Callable[[str], None] = lambda text: None):
        self._family, self._note = family, note
        self._port = open_port(family.model, family.anatomy)
        self._decoder: Any = family.model.get_submodule(family.anatomy.llm)
        self._plain = read_all(family.model, family.anatomy)
        self._before, self._after = Rows(), Rows()
        self._runs: tuple[Tuned, ...] = ()
        self._most = math.inf  # tokens at once; fewer where memory ran out

    def add_gradients(self, asked: Sequence[Asked]) -> list[Tensor | Exception]:
        """Losses (A,) of each batch; gradients are added to each run's parameters.

        Where a run's cannot be computed, its error is in their place, and its gradients are of no use.
        """
        entering = [self._enters(each) for each in asked]
        losses: dict[int, Tensor | Exception] = {}
        for group in _groups(asked, entering, self._most):
            ours = [each for place in group if (each := entering[place]) is not None]
            found = self._together(ours) if len(ours) > 1 else [_alone(asked[place]) for place in group]
            losses |= zip(group, found, strict=True)
        return [losses[place] for place in range(len(asked))]

    def _enters(self, asked: Asked) -> Entering | None:
        """A run's batch at the decoder's door, if it can be computed with others."""
        if not self._joins(asked):
            return None
        try:
            return _entering(asked)
        except Exception:  # by itself it fails likewise, and that is the run's own affair
            return None

    def _joins(self, asked: Asked) -> bool:
        """Whether a run can be computed with others, as far as is known."""
        proof, lean = asked.tuned.proofs.get(NAME), lean_of(asked.tuned.decoder)
        if (proof is not None and not proof.passed) or asked.batch.packing is None:
            return False
        if lean is None or not lean.on or lean.last is None or None in self._plain:
            return False
        if recompute_of(asked.tuned.decoder) != "none":  # it keeps less than a product with others would
            return False
        layers: list[Any] = layers_of(asked.tuned.base, asked.tuned.family.anatomy)
        return all(map(_is_whole, layers))

    def _together(self, entering: Sequence[Entering]) -> Sequence[Tensor | Exception]:
        """The gradients of runs that join; of each by itself, where that does not succeed."""
        asked = [each.asked for each in entering]
        before = [_taken(each) for each in asked]
        try:
            losses = self._at_once(entering)
        except Exception as error:
            why, no_memory = (str(error) or type(error).__name__).splitlines()[0], is_out_of_memory(error)
        else:
            for each, so_far in zip(asked, before, strict=True):
                _add(each, so_far)
            return losses
        # only here, where the error is gone, and with it the tensors that its frames hold
        self._remember(asked, no_memory=no_memory, why=why)
        for each, so_far in zip(asked, before, strict=True):
            _taken(each)
            _add(each, so_far)
        return [_alone(each) for each in asked]

    def _remember(self, asked: Sequence[Asked], *, no_memory: bool, why: str) -> None:
        """Take fewer tokens at once from now on; or, where it was not for memory, do not try these again."""
        if no_memory:
            self._most = sum(map(by_tokens, asked)) / 2
            self._note(
                f"WARNING: out of memory ({why}). From here on runs have {self._most:,.0f} tokens at once together."
            )
            return
        for each in asked:
            each.tuned.proofs[NAME] = Proof(None, 0.0, why)
        self._note(NOT_AT_ONCE.format(why=why))

    def _at_once(self, entering: Sequence[Entering]) -> list[Tensor]:
        """The gradients of runs that have none yet; the first time they are held against those of the run alone."""
        asked = [each.asked for each in entering]
        if all(NAME in each.tuned.proofs for each in asked):
            return self._joined(entering)
        plain, found = [], []
        for each in asked:
            found.append(each.alone())
            plain.append(_taken(each))
        again = [each for each in map(_entering, asked) if each is not None]  # a learned prefix's graph is used up
        losses = self._joined(again)
        ours = [_taken(each) for each in asked]
        for each, mine, alone in zip(asked, ours, plain, strict=True):
            each.tuned.proofs[NAME] = proof = _compared(mine, alone, each.tuned)
            if not proof.passed:
                self._note(NOT_JOINED.format(difference=proof.difference, tolerance=proof.tolerance))
        passed = all(each.tuned.proofs[NAME].passed for each in asked)
        for each, mine in zip(asked, ours if passed else plain, strict=True):
            _add(each, mine)
        return losses if passed else found

    def _joined(self, entering: Sequence[Entering]) -> list[Tensor]:
        self._is_for(tuple(each.asked.tuned for each in entering))
        with entering[0].asked.tuned.precision():
            losses = self._losses(entering)
        means = [each.sum() / of.asked.answers for each, of in zip(losses, entering, strict=True)]
        torch.autograd.backward(means)
        return [each.detach() for each in losses]

    def _is_for(self, runs: tuple[Tuned, ...]) -> None:
        """Put these runs' layers on the decoder, where they are others than before."""
        if len(runs) != len(self._runs) or any(a is not b for a, b in zip(runs, self._runs, strict=True)):
            self._put_on(runs)
            self._runs = runs

    def _put_on(self, runs: Sequence[Tuned]) -> None:
        model, anatomy = self._family.model, self._family.anatomy
        remove(model, anatomy)
        of_runs = zip(*(parts_of(run.base, anatomy) for run in runs), strict=True)
        shared: list[Parts | None] = []
        for plain, own in zip(self._plain, of_runs, strict=True):
            last = len(shared) == len(self._plain) - 1  # after its attention it has the answers alone
            known = [parts for parts in own if parts is not None]
            assert plain is not None, "the runs join"
            shared.append(joined(plain, known, before=self._before, after=self._after if last else self._before))
        put_on(model, anatomy, shared, trim=True)

    def _losses(self, runs: Sequence[Entering]) -> list[Tensor]:
        """(A,) of each run."""
        packing = Joined(tuple(_packing(run.batch) for run in runs))
        self._port.packing = packing
        self._port.of_several = LearnedOfSeveral([_learned(run.asked.tuned) for run in runs], packing)
        counts = [run.batch.answer_tokens for run in runs]
        self._before.lay([row.length for row in packing.rows])
        self._after.lay(counts)
        self._before.draws = self._after.draws = [run.draws for run in runs]
        columns = [run.batch.columns + begin for run, begin in zip(runs, packing.begins, strict=True)]
        places = torch.cat(columns)
        self._decoder.lean.answers = torch.zeros_like(places), places
        hidden = self._decoder(
            inputs_embeds=torch.cat([run.embedded for run in runs], dim=1),
            position_ids=_positions(runs),
            attention_mask=NO_MASK.to(places.device),
            use_cache=False,
        ).last_hidden_state  # (1, A of all, D)
        return [
            nn.functional.cross_entropy(run.asked.tuned.family.logits(own).float(), run.batch.targets, reduction="none")
            for run, own in zip(runs, hidden[0].split(counts), strict=True)
        ]


def _positions(runs: Sequence[Entering]) -> Tensor:
    """(1, T of all), or (P, 1, T of all) where a batch has them on several axes; text alone has the same on each."""
    axes = max((run.positions for run in runs), key=Tensor.dim).shape[:-2]
    return torch.cat([run.positions.expand(*axes, -1, -1) for run in runs], dim=-1)


def _is_whole(layer: Any) -> bool:
    """Whether a run's layer is wholly computed by functions now."""
    parts: Parts | None = layer.__dict__.get("lean_parts")
    return parts is not None and parts.whole


def _groups(asked: Sequence[Asked], entering: Sequence[Entering | None], most: float) -> Iterator[list[int]]:
    """Places of those that are computed at once; one that cannot be, or is enough for a device, is alone."""
    some: list[int] = []
    for place, each in enumerate(asked):
        if entering[place] is None:
            yield [place]
            continue
        together = [*(asked[other] for other in some), each]
        limit = min(most, *(one.limit or MOST_TOKENS for one in together))
        if some and (asked[some[0]].tuned.bf16 != each.tuned.bf16 or sum(map(by_tokens, together)) > limit):
            yield some
            some = []
        some.append(place)
    if some:
        yield some


def _entering(asked: Asked) -> Entering | None:
    """A batch up to the decoder's door, by the run's own model; None where the decoder is given something unknown."""
    tuned, batch = asked.tuned, asked.batch.to(asked.tuned.device)
    given: dict[str, Any] = {}

    def take(**kwargs: Any) -> BaseModelOutputWithPast:
        given.update(kwargs)
        return BaseModelOutputWithPast(last_hidden_state=kwargs.get("inputs_embeds"))

    torch.manual_seed(asked.seed)
    decoder: Any = tuned.decoder
    decoder.forward = take
    try:
        with tuned.precision():
            tuned.base.base_model(**tuned.asked_of_base(batch))
    finally:
        del decoder.forward
    known = {name: given.pop(name, None) for name in GIVEN}
    odd = [name for name, value in given.items() if value is not None and value is not False]
    if odd or known["inputs_embeds"] is None or known["position_ids"] is None:
        tuned.proofs[NAME] = Proof(None, 0.0, f"its decoder is given {', '.join(odd) or 'no embeddings'}")
        return None
    drops = any(parts.drops for parts in parts_of(tuned.base, tuned.family.anatomy) if parts is not None)
    state = generator_state(tuned.device) if drops else None
    return Entering(asked, batch, known["inputs_embeds"], known["position_ids"], state)


def _taken(asked: Asked) -> list[Tensor | None]:
    """The gradients of a run, which has none then."""
    found = []
    for parameter in asked.tuned.trainable().values():
        found.append(parameter.grad)
        parameter.grad = None
    return found


def _add(asked: Asked, more: Sequence[Tensor | None]) -> None:
    """Add gradients to those that a run has."""
    for parameter, other in zip(asked.tuned.trainable().values(), more, strict=True):
        own = parameter.grad
        parameter.grad = other if own is None else own if other is None else other.add_(own)


def _alone(asked: Asked) -> Tensor | Exception:
    """A run's gradients by itself, or its error."""
    try:
        return asked.alone()
    except Exception as error:
        return error


def _compared(ours: Sequence[Tensor | None], alone: Sequence[Tensor | None], tuned: Tuned) -> Proof:
    """A run's gradients with others beside those without."""
    tolerance = TOLERANCE[torch.bfloat16 if tuned.bf16 or tuned.base.dtype != torch.float32 else torch.float32]
    pairs = [(one, other) for one, other in zip(ours, alone, strict=True) if other is not None]
    if not all(other.isfinite().all() for _, other in pairs):
        return Proof(0.0, tolerance)  # training stops at these samples, and names them
    off = sum((one - other).double().square().sum().item() if one is not None else math.inf for one, other in pairs)
    of = sum(other.double().square().sum().item() for _, other in pairs)
    return Proof(math.sqrt(off / max(of, torch.finfo(torch.float32).tiny)), tolerance)


def _packing(batch: Batch) -> Any:
    assert batch.packing is not None, "runs whose batches are packed are joined"
    return batch.packing


def _learned(tuned: Tuned) -> Any:
    port = port_of(tuned.decoder)
    return None if port is None else port.learned


def by_tokens(asked: Asked) -> float:
    """How much there is to compute."""
    return asked.batch.tokens
