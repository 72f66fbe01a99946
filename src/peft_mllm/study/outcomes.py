"""What a study's analysis works on: runs with their factors, figures and per-question scores.

An outcome comes from a run directory (`index.py`) or from a line of somebody's table (`imported.py`); the
statistics, the report and the advice know no other thing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peft_mllm.study.results import Result

NOT_VARIED = "\N{EN DASH}"
"""The label of an axis that means nothing for a run, such as the size of a method without one."""


@dataclass(frozen=True)
class Answers:
    """What one run scored on one task.

    Attributes:
        task: name.
        metric: name on the metrics shelf.
        value: the headline figure.
        unit: `%`, or nothing.
        ids: the questions, in the order of `scores`.
        scores: (questions,) in the headline's unit; their mean is the headline. Empty where they are not known.
        values: every figure of the metric by name.
    """

    task: str
    metric: str
    value: float
    unit: str
    ids: tuple[str, ...] = ()
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """One point of a run's training curve at which it was scored."""

    step: int
    epoch: float
    eval_loss: float | None
    best: bool
    scores: Mapping[str, Answers]


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
        run: what a reader is referred to: the run's directory name, or the line of an imported table.
        factors: label by axis, without the seed: model, method, connector, task ...; `task` is the trained task.
        seed: None where nothing is drawn (zero-shot).
        scores: by task, the trained one and the others that it was scored on.
        curve: the points of the training curve that were scored, in order of steps.
        figures: the ledger (ledger.py): trainable, seconds, memory, disk, flops ...; absent where not known.
        result: the file it was read from; None for an imported line.
    """

    run: str
    factors: Mapping[str, str]
    seed: int | None
    scores: Mapping[str, Answers]
    curve: Sequence[CurvePoint] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    result: Result | None = None

    @property
    def task(self) -> str:
        """The task that it was trained on."""
        return self.factors.get("task", "")

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing was trained."""
        return self.factors.get("method") == ZERO_SHOT


ZERO_SHOT = "zero-shot"
FULL = "full fine-tuning"
"""Labels of the two rows that every study has."""


@dataclass(frozen=True)
class Cell:
    """The outcomes that differ in nothing but the seed.

    Attributes:
        factors: as of each outcome.
        outcomes: in order of seeds.
    """

    factors: Mapping[str, str]
    outcomes: tuple[Outcome, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """In order."""
        return tuple(outcome.seed for outcome in self.outcomes)

    def scores(self, task: str) -> NDArray[np.float64]:
        """Per seed and question, (seeds, questions), in the headline's unit; (0, 0) where not known.

        Questions are those that all seeds answered, in the order of the first.
        """
        answers = [outcome.scores[task] for outcome in self.outcomes if task in outcome.scores]
        if not answers or any(not answer.ids for answer in answers):
            return np.empty((0, 0))
        return aligned(answers)


def aligned(answers: Sequence[Answers]) -> NDArray[np.float64]:
    """Scores of several runs on the questions that all of them answered, (runs, questions)."""
    first = answers[0].ids
    if all(answer.ids == first for answer in answers[1:]):
        return np.stack([answer.scores for answer in answers])
    common = set(first).intersection(*(answer.ids for answer in answers[1:]))
    kept = [name for name in first if name in common]
    places = [dict(zip(answer.ids, answer.scores, strict=True)) for answer in answers]
    return np.array([[place[name] for name in kept] for place in places])


def cells_of(outcomes: Sequence[Outcome]) -> tuple[Cell, ...]:
    """Outcomes gathered by their factors, in order of first appearance."""
    gathered: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for outcome in outcomes:
        gathered.setdefault(tuple(sorted(outcome.factors.items())), []).append(outcome)
    return tuple(
        Cell(group[0].factors, tuple(sorted(group, key=lambda outcome: outcome.seed or 0)))
        for group in gathered.values()
    )
