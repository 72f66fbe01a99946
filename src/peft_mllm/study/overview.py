"""The lines of a study's overview: each the runs that differ in the seed alone, with score, price and ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peft_mllm.study.analysis import Line
from peft_mllm.study.contest import task_of
from peft_mllm.study.inference.differences import difference
from peft_mllm.study.ledger import HALLUCINATION, ROBUSTNESS
from peft_mllm.study.outcomes import Cell
from peft_mllm.study.pairing import Group, estimate, group_of, matched, minus, stacked
from peft_mllm.study.statistics import Estimate


@dataclass(frozen=True)
class Row:
    """A line in the making: a cell with its scores, and the zero-shot cell beside it.

    Attributes:
        cell: the runs.
        base: the zero-shot line's row; None for itself, and without one.
        seen: the study's seen tasks.
    """

    cell: Cell
    base: Row | None
    seen: tuple[str, ...]

    @property
    def task(self) -> str:
        """The trained one."""
        return task_of(self.cell)

    def on(self, task: str) -> Group | None:
        """The scores on a task."""
        if task not in self._groups:
            self._groups[task] = group_of(self.cell, task)
        return self._groups[task]

    @cached_property
    def _groups(self) -> dict[str, Group | None]:
        return {}

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing was trained."""
        return self.cell.outcomes[0].is_zero_shot

    def mean_of(self, name: str) -> float | None:
        """The mean over seeds of a figure of the ledger; None where no run has it."""
        known = [outcome.figures[name] for outcome in self.cell.outcomes if name in outcome.figures]
        return float(np.mean(known)) if known else None

    @cached_property
    def own(self) -> Group | None:
        """The scores on the trained task."""
        return self.on(self.task)

    @cached_property
    def score(self) -> Estimate | None:
        """On the trained task."""
        return self.own.interval() if self.own else None

    @cached_property
    def forgettable(self) -> tuple[str, ...]:
        """The seen tasks that it was not trained on."""
        return tuple(task for task in self.seen if task != self.task)

    def line(self, *, letters: str = "", best: bool = False) -> Line:
        """As data.

        Args:
            letters: of the groups that cannot be told apart.
            best: whether it is told apart from all others.
        """
        outcomes = self.cell.outcomes
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.figures)
        figures = {name: value for name in names if (value := self.mean_of(name)) is not None}
        values = self.own.values if self.own else np.empty(0)
        return Line(
            factors=self.cell.factors,
            seeds=len(outcomes),
            score=self.score,
            sd=float(values.std(ddof=1)) if values.size > 1 else None,
            gain=self.gain,
            seen=self._seen_mean(),
            forgotten=self.forgotten,
            hallucination=figures.get(HALLUCINATION),
            robustness=figures.get(ROBUSTNESS),
            figures={name: value for name, value in figures.items() if name not in (HALLUCINATION, ROBUSTNESS)},
            letters=letters,
            best=best,
            runs=tuple(outcome.run for outcome in outcomes),
        )

    @cached_property
    def gain(self) -> Estimate | None:
        """Over zero-shot, on the trained task."""
        before = self.base.on(self.task) if self.base else None
        return estimate(minus(self.own, before)) if self.own and before else None

    def _seen_mean(self) -> float | None:
        groups = [self.on(task) for task in self.forgettable]
        if not groups or any(group is None for group in groups):
            return None
        return float(np.mean([group.values.mean() * group.points for group in groups if group]))

    @cached_property
    def forgotten(self) -> Estimate | None:
        """Zero-shot's mean on the seen tasks minus this one's, each task with the same weight."""
        if self.base is None or not self.forgettable:
            return None
        pairs = [(self.base.on(task), self.on(task)) for task in self.forgettable]
        both = [(before, after) for before, after in pairs if before and after]
        return _lost(both) if len(both) == len(pairs) else None


def _lost(pairs: Sequence[tuple[Group, Group]]) -> Estimate | None:
    value = float(np.mean([(before.values.mean() - after.values.mean()) * after.points for before, after in pairs]))
    if not all(before.known and after.known for before, after in pairs):
        return Estimate(value)
    found = [matched([before, after]) for before, after in pairs]
    scores = [each for each in found if each is not None]
    if len(scores) < len(pairs) or len({each[0].shape[0] for each in scores}) > 1:
        return Estimate(value)
    before = stacked([each[0] * after.points for each, (_, after) in zip(scores, pairs, strict=True)])
    after = stacked([each[1] * after.points for each, (_, after) in zip(scores, pairs, strict=True)])
    return estimate(difference(before, after))
