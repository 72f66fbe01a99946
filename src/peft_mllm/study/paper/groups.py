"""The runs of a study gathered over seeds: what each is in the paper's terms, with its scores in the paper's units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from peft_mllm.study.inference.differences import shown_of_seeds
from peft_mllm.study.inference.variance import Seeds
from peft_mllm.study.outcomes import Answers, Cell, Outcome, cells_of
from peft_mllm.study.pairing import Scored, after_best, on_shared, points_per_unit, scored_of
from peft_mllm.study.paper.names import NO_PEFT, Setting, canonical_task, setting_of

SHARE_WITH_IMAGE = "scienceqa"
"""The paper's column is `SQA (img)`: trained on all questions, scored on those that have an image."""


@dataclass(frozen=True)
class Group:
    """Trained runs that differ in the seed alone.

    Attributes:
        cell: the runs.
        setting: what they are in the paper's terms.
        families: the groups that it competes with, itself among them, for each block that it is in.
    """

    cell: Cell
    setting: Setting
    families: list[list[Group]] = field(default_factory=list, compare=False, repr=False)

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


def groups_of(outcomes: Sequence[Outcome], *, blocks: Sequence[Sequence[Cell]] = ()) -> tuple[Group, ...]:
    """The trained runs, parameter-efficient or not; zero-shot is none of them.

    Args:
        outcomes: the runs.
        blocks: the cells that compete with each other.
    """
    trained = [outcome for outcome in outcomes if not outcome.is_zero_shot]
    groups = tuple(Group(cell, setting_of(cell.outcomes[0])) for cell in cells_of(trained))
    by_factors = {_key(group.cell): group for group in groups}
    for block in blocks:
        family = [by_factors[_key(cell)] for cell in block if _key(cell) in by_factors]
        for group in family:
            group.families.append(family)
    return groups


def _key(cell: Cell) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(cell.factors.items()))


def shown_by_rivals(first: Group, second: Group, task: str) -> Seeds | None:
    """What the block of two groups shows of seeds; None where they do not compete, or share nothing."""
    family = next((each for each in first.families if any(group is second for group in each)), [])
    own = [each for each in (first.scored(task), second.scored(task)) if each is not None]
    shared = on_shared(own) if family and len(own) == 2 else None
    if shared is None or len(shared[0].seeds) < 2:
        return None
    scores = {}
    for place, group in enumerate(family):
        scored = group.scored(task)
        found = on_shared([shared[0], scored]) if scored is not None and scored.has_seed else None
        if found is not None and found[0].scores.shape == shared[0].scores.shape:
            scores[str(place)] = found[1].scores
    names = [str(place) for place, group in enumerate(family) if group is first or group is second]
    return shown_of_seeds(scores, names[0], names[1]) if set(names) <= scores.keys() else None


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
