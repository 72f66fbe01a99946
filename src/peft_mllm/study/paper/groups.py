"""The runs of a study gathered over seeds: what each is in the paper's terms, with its scores in the paper's units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from peft_mllm.study.outcomes import Answers, Cell, Outcome, aligned, cells_of
from peft_mllm.study.paper.names import NO_PEFT, Setting, canonical_task, setting_of

PER_CENT = {"caption": 100.0, "pope": 100.0, "chair": 100.0}
"""Metrics whose official figure is a share or CIDEr's ratio: the paper prints them times 100."""
SHARE_WITH_IMAGE = "scienceqa"
"""The paper's column is `SQA (img)`: trained on all questions, scored on those that have an image."""


@dataclass(frozen=True)
class Scored:
    """Scores of a group on one task.

    Attributes:
        seeds: of the runs, in order.
        ids: of the questions.
        scores: (seeds, questions), in the paper's unit.
    """

    seeds: tuple[int | None, ...]
    ids: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Trained runs that differ in the seed alone."""

    cell: Cell
    setting: Setting

    @property
    def factors(self) -> Mapping[str, str]:
        """Label by axis."""
        return self.cell.factors

    @property
    def method(self) -> str:
        """Name on the methods shelf."""
        return self.setting.method

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Keys of its scores."""
        return tuple(dict.fromkeys(task for outcome in self.cell.outcomes for task in outcome.scores))

    @cached_property
    def trained(self) -> str:
        """The key of its scores on the task that it was trained on; empty where there is none."""
        own = (self.cell.outcomes[0].task, self.setting.task)
        return next((task for task in self.tasks if task in own or canonical_task(task) in own), "")

    @cached_property
    def _scored(self) -> dict[str, Scored | None]:
        return {task: _scored(self.cell.outcomes, task) for task in self.tasks}

    def scored(self, task: str) -> Scored | None:
        """Its scores on a task; None where single questions are not known."""
        return self._scored.get(task)

    def scored_at(self, task: str, point: int) -> Scored | None:
        """Its scores on a task, so many scored points after the lowest validation loss; None where a seed has none."""
        outcomes = [after_best(outcome, point) for outcome in self.cell.outcomes]
        if any(outcome is None for outcome in outcomes):
            return None
        return _scored([outcome for outcome in outcomes if outcome is not None], task)


def groups_of(outcomes: Sequence[Outcome]) -> tuple[Group, ...]:
    """The trained runs, parameter-efficient or not; zero-shot is none of them."""
    trained = [outcome for outcome in outcomes if not outcome.is_zero_shot]
    return tuple(Group(cell, setting_of(cell.outcomes[0])) for cell in cells_of(trained))


def peft_only(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Without full fine-tuning and without what trains nothing of the language model."""
    return tuple(group for group in groups if group.method not in NO_PEFT)


def after_best(outcome: Outcome, point: int) -> Outcome | None:
    """A run as it was at a point of its curve: 0 for the lowest validation loss, then 1, 2 ... after it."""
    best = next((place for place, each in enumerate(outcome.curve) if each.best), None)
    if best is None or best + point >= len(outcome.curve):
        return None
    return replace(outcome, scores=outcome.curve[best + point].scores)


def scale(answers: Answers) -> float:
    """What a score is multiplied with to be in the paper's unit."""
    return PER_CENT.get(answers.metric.partition(":")[0], 1.0)


def _scored(outcomes: Sequence[Outcome], task: str) -> Scored | None:
    there = [outcome for outcome in outcomes if task in outcome.scores]
    answers = [_with_image(outcome, task) for outcome in there]
    if not answers or not all(answer.ids for answer in answers):
        return None
    common = set(answers[0].ids).intersection(*(answer.ids for answer in answers[1:]))
    ids = tuple(name for name in answers[0].ids if name in common)
    if not ids:
        return None
    return Scored(tuple(outcome.seed for outcome in there), ids, aligned(answers) * scale(answers[0]))


def _with_image(outcome: Outcome, task: str) -> Answers:
    """The answers to be counted: of ScienceQA, those to questions with an image."""
    answers = outcome.scores[task]
    if canonical_task(task) != SHARE_WITH_IMAGE or outcome.result is None:
        return answers
    seen = {each.id for each in outcome.result.predictions.get(task, ()) if each.images}
    kept = [place for place, name in enumerate(answers.ids) if name in seen]
    if not kept:
        return answers
    return replace(answers, ids=tuple(answers.ids[place] for place in kept), scores=answers.scores[kept])
