"""The runs of a study gathered over seeds: what each is in the paper's terms, with its scores in the paper's units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from peft_mllm.study.outcomes import Answers, Cell, Outcome, cells_of
from peft_mllm.study.pairing import Scored, after_best, points_per_unit, scored_of
from peft_mllm.study.paper.names import NO_PEFT, Setting, canonical_task, setting_of

SHARE_WITH_IMAGE = "scienceqa"
"""The paper's column is `SQA (img)`: trained on all questions, scored on those that have an image."""


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
        points = [(outcome, after_best(outcome, point)) for outcome in self.cell.outcomes]
        there = [replace(outcome, scores=at.scores) for outcome, at in points if at is not None]
        return _scored(there, task) if len(there) == len(points) else None


def groups_of(outcomes: Sequence[Outcome]) -> tuple[Group, ...]:
    """The trained runs, parameter-efficient or not; zero-shot is none of them."""
    trained = [outcome for outcome in outcomes if not outcome.is_zero_shot]
    return tuple(Group(cell, setting_of(cell.outcomes[0])) for cell in cells_of(trained))


def peft_only(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Without full fine-tuning and without what trains nothing of the language model."""
    return tuple(group for group in groups if group.method not in NO_PEFT)


def _scored(outcomes: Sequence[Outcome], task: str) -> Scored | None:
    """In the paper's unit: where an official figure is a share or CIDEr's ratio, the paper prints it times 100."""
    runs = [(outcome.seed, _with_image(outcome, task)) for outcome in outcomes if task in outcome.scores]
    found = scored_of(runs) if runs else None
    if found is None or not found.known:
        return None
    points, (low, high) = points_per_unit(runs[0][1].metric), found.bounds
    return replace(found, scores=found.scores * points, bounds=(low * points, high * points))


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
