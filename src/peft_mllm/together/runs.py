"""The runs of a crew: each goes its own way through `run`, and meets the others at every step's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from peft_mllm.common import Common
from peft_mllm.errors import SpecError, UserError
from peft_mllm.features import Held
from peft_mllm.interrupt import stop_requests
from peft_mllm.loading import load_family
from peft_mllm.models import Family
from peft_mllm.run import Result, run
from peft_mllm.screen import Screen
from peft_mllm.spec import ModelSpec, Spec
from peft_mllm.together.crew import Crew, Member
from peft_mllm.together.joined import Asked, SharedBase, by_tokens
from peft_mllm.training import Compute
from peft_mllm.tuned import Tuned
from peft_mllm.world import World

Runs = Member[Asked, Tensor]


def why_not_together(specs: Sequence[Spec]) -> str:
    """Why these runs cannot share a base; empty where they can."""
    if len({(spec.model, spec.train.bf16) for spec in specs}) > 1:
        return "they are of different bases, or of different precision"
    for spec in specs:
        if spec.vision == "tuned":
            return f"{spec.title} ({spec.output_dir}) tunes the vision tower, which the others have frozen"
        if spec.speed.shard not in ("auto", "none"):
            return f"{spec.title} ({spec.output_dir}) holds the base in pieces"
    folders = [str(Path(spec.output_dir).resolve()) for spec in specs]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    return f"{twice[0]} is the directory of several" if twice else ""


def run_together(specs: Sequence[Spec], *, quiet: bool = False) -> list[Result | UserError]:
    """Train and evaluate several specs on one base, from wherever earlier calls stopped.

    Args:
        specs: of one base model; methods, seeds, learning rates, tasks may differ.
        quiet: show nothing.

    Returns:
        for each spec the content of its result.json, or the error that ended it; the others go on.

    Raises:
        SpecError: they cannot share a base; says which.
    """
    outcomes = outcomes_of(specs, quiet=quiet)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, UserError):
            raise outcome
    return outcomes  # type: ignore[return-value]  # what is no UserError was raised


def outcomes_of(specs: Sequence[Spec], *, quiet: bool = False) -> list[Result | BaseException]:
    """The same, with any error of a run in its place.

    Raises:
        SpecError: they cannot share a base; says which.
    """
    several = "there are several processes, which train one run" if World().size > 1 else ""
    if why := several or why_not_together(specs):
        raise SpecError(f"These runs cannot be trained together: {why}.")
    base = Base(Screen(quiet=quiet).note)
    crew: Crew[Asked, Tensor] = Crew(base.gradients, weigh=by_tokens)
    with stop_requests() as stop:
        shown = [quiet or number > 0 for number in range(len(specs))]  # they go in step: one bar tells of all
        return crew.work(
            [_task(spec, base, stop, runs=len(specs), quiet=each) for spec, each in zip(specs, shown, strict=True)]
        )


def _task(spec: Spec, base: Base, stop: Callable[[], bool], *, runs: int, quiet: bool) -> Callable[[Runs], Result]:
    def task(member: Runs) -> Result:
        common = replace(
            base.common,
            runs=runs,
            compute=lambda tuned, limit: _compute(member, tuned, limit),
            clock=member.clock,
            stop=stop,
        )
        return run(spec, quiet=quiet, common=common)

    return task


def _compute(member: Runs, tuned: Tuned, limit: int | None) -> Compute:
    """A run's gradients, computed with those of the others."""
    return lambda batch, seed, answers: member.meet(Asked(tuned, batch, seed, answers, limit))


class Base:
    """What the runs have in common; the base is loaded when the first asks for it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.common = Common(load=self._load, held=Held())
        self._family: Family | None = None
        self._shared: SharedBase | None = None

    def _load(self, model: ModelSpec, dtype: str) -> Family:
        """A twin of the base for a run to put its method on."""
        if self._family is None:
            self._family = load_family(model, dtype=dtype)
        return self._family.twin()

    def gradients(self, asked: Sequence[Asked]) -> list[Tensor | Exception]:
        """Losses of each run's batch, or its error; gradients are added to its parameters."""
        assert self._family is not None, "the runs have loaded it"
        if self._shared is None:
            self._shared = SharedBase(self._family.twin(), note=self._note)
        return self._shared.add_gradients(asked)
