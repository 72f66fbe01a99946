"""Runs that differ in the seed alone, as groups whose scores may be compared: the same seeds, the same questions.

A group without a seed (zero-shot) is the same whatever the seed, so it is paired with every one of the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from peft_mllm.metrics import METRICS
from peft_mllm.study.inference.differences import (
    Comparison,
    Difference,
    difference,
    differences_by_seed,
    holm,
    paired_differences,
    unstable,
)
from peft_mllm.study.inference.intervals import UNBOUNDED, Bounds, clipped, interval_by_seed, mean_interval
from peft_mllm.study.outcomes import Answers, Cell, CurvePoint, Outcome, aligned
from peft_mllm.study.statistics import Estimate

Scores = NDArray[np.float64]

_BOUNDS: Mapping[str, Bounds] = {"pope": (0, 1), "chair": (0, 1), "mmhal": (0, 6), "caption": (0, 10)}
"""By metric, where its figures are no per cents; CIDEr goes up to 10."""


@dataclass(frozen=True)
class Scored:
    """Scores on one task of runs that differ in the seed alone.

    Attributes:
        seeds: of the runs, in order; (None,) where nothing is drawn.
        ids: of the questions that all runs answered; none where single questions are not known.
        scores: (seeds, questions).
        bounds: the least and the most that a score can be.
    """

    seeds: tuple[int | None, ...]
    ids: tuple[str, ...]
    scores: Scores
    bounds: Bounds

    @property
    def known(self) -> bool:
        """Whether single questions are known."""
        return bool(self.ids)

    @property
    def has_seed(self) -> bool:
        """Whether anything was drawn."""
        return self.seeds != (None,)


@dataclass(frozen=True)
class Group(Scored):
    """One task's scores of a cell, in the headline's unit.

    Attributes:
        values: (seeds,), the headlines.
        points: what brings a score to points of a hundred, for averages over tasks.
    """

    values: Scores
    points: float

    def interval(self) -> Estimate:
        """The mean with its interval over seeds and questions; over seeds alone where no question is known."""
        found = mean_interval(self.scores) if self.known else interval_by_seed(self.values)
        return plain(clipped(found, self.bounds))


def group_of(cell: Cell, task: str) -> Group | None:
    """A cell's scores on a task; None where no run has any."""
    return _group([(outcome.seed, outcome.scores[task]) for outcome in cell.outcomes if task in outcome.scores])


def group_at(cell: Cell, task: str, point: int) -> Group | None:
    """Likewise at a point of the training curve: 0 for the lowest validation loss, then 1, 2 ... after it."""
    found = [(outcome.seed, after_best(outcome, point)) for outcome in cell.outcomes]
    return _group([(seed, each.scores[task]) for seed, each in found if each is not None and task in each.scores])


def points_of(cell: Cell) -> int:
    """How many points of the training curve, from the best on, every run of a cell has."""
    counts = []
    for outcome in cell.outcomes:
        best = next((place for place, each in enumerate(outcome.curve) if each.best), None)
        counts.append(0 if best is None else len(outcome.curve) - best)
    return min(counts)


def after_best(outcome: Outcome, point: int) -> CurvePoint | None:
    """A point of a run's training curve: 0 for the lowest validation loss, then 1, 2 ... after it."""
    best = next((place for place, each in enumerate(outcome.curve) if each.best), None)
    return None if best is None or best + point >= len(outcome.curve) else outcome.curve[best + point]


def _group(runs: Sequence[tuple[int | None, Answers]]) -> Group | None:
    if not runs:
        return None
    found = scored_of(runs)
    answers = [each for _, each in runs]
    values = np.array([each.value for each in answers])
    return Group(found.seeds, found.ids, found.scores, found.bounds, values, points_per_unit(answers[0].metric))


def scored_of(runs: Sequence[tuple[int | None, Answers]]) -> Scored:
    """What runs scored, each with its seed, on the questions that all of them answered; at least one run."""
    answers = [each for _, each in runs]
    ids, scores = answers[0].ids, np.empty((len(answers), 0))
    if all(each.ids for each in answers):
        if any(each.ids != ids for each in answers):
            ids = _common([each.ids for each in answers])
        scores = aligned(answers)
    else:
        ids = ()
    return Scored(tuple(seed for seed, _ in runs), ids, scores, bounds_of(answers[0]))


@lru_cache(maxsize=64)
def points_per_unit(metric: str) -> float:
    """100 for metrics that print shares (and CIDEr's ratio), 1 for those that print per cent or are not known."""
    name = metric.partition(":")[0]
    return 100.0 if name in METRICS and METRICS[name].unit == "0-1" else 1.0


def bounds_of(answers: Answers) -> Bounds:
    """The least and the most that a score can be; infinite where that is not known."""
    return (0.0, 100.0) if answers.unit == "%" else _BOUNDS.get(answers.metric.partition(":")[0], UNBOUNDED)


def bounds_over(tasks: Sequence[Group]) -> Bounds:
    """Of the mean over tasks, in points of a hundred."""
    low, high = np.mean([np.array(group.bounds) * group.points for group in tasks], axis=0)
    return float(low), float(high)


def _common(ids: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    common = set(ids[0]).intersection(*ids[1:])
    return tuple(name for name in ids[0] if name in common)


# --- groups together ---


def matched(groups: Sequence[Scored]) -> list[Scores] | None:
    """The scores of several groups on the seeds and questions that all have, each (S, Q); None where there are none."""
    found = on_shared(groups)
    return None if found is None else [each.scores for each in found]


def on_shared(groups: Sequence[Scored]) -> list[Scored] | None:
    """Several groups on the seeds and questions that all of them have; None where there are none."""
    seeded = [group for group in groups if group.has_seed]
    seeds = [seed for seed in seeded[0].seeds if all(seed in group.seeds for group in seeded)] if seeded else [None]
    ids = groups[0].ids
    if any(group.ids != ids for group in groups):
        ids = _common([group.ids for group in groups])
    if not seeds or not ids:
        return None
    return [Scored(tuple(seeds), ids, _at(group, seeds, ids), group.bounds) for group in groups]


def _at(group: Scored, seeds: Sequence[int | None], ids: tuple[str, ...]) -> Scores:
    rows = [group.seeds.index(seed) for seed in seeds] if group.has_seed else [0] * len(seeds)
    chosen = group.scores if rows == list(range(len(group.seeds))) else group.scores[rows]
    if group.ids == ids:
        return chosen
    places = {name: column for column, name in enumerate(group.ids)}
    return chosen[:, [places[name] for name in ids]]


def comparable(groups: Mapping[str, Group]) -> dict[str, Scores]:
    """The groups that may be compared all together, on the seeds and questions that each of them has.

    A study that is not finished has groups with fewer seeds. One seed says nothing of others: a group that would
    bring all down to one is left out instead.
    """
    known = {name: group for name, group in groups.items() if group.known}
    seeded = [group for group in known.values() if group.has_seed]
    least = min(max((len(group.seeds) for group in seeded), default=1), 2)
    kept: dict[str, Group] = {}
    common: list[int | None] | None = None
    for name in sorted(known, key=lambda each: -len(known[each].seeds)):
        if known[name].has_seed:
            own = known[name].seeds
            shared = [seed for seed in (own if common is None else common) if seed in own]
            if len(shared) < least:
                continue
            common = shared
        kept[name] = known[name]
    names = [name for name in groups if name in kept]
    scores = matched([kept[name] for name in names]) if names else None
    return dict(zip(names, scores, strict=True)) if scores else {}


def on_common_questions(groups: Mapping[str, Group]) -> dict[str, Group]:
    """The groups on the questions that all of them answered, each with its own seeds."""
    known = {name: group for name, group in groups.items() if group.known}
    ids = [group.ids for group in known.values()]
    if not ids or all(each == ids[0] for each in ids):
        return known
    common = _common(ids)
    return {
        name: replace(group, ids=common, scores=_at(group, group.seeds, common))
        for name, group in known.items()
        if common
    }


def pairwise_differences(groups: Mapping[str, Group]) -> tuple[list[Comparison], list[tuple[str, str]]]:
    """All pairs of groups that may be compared, each on the seeds that both have, with Holm's correction over all.

    A run that failed takes a seed from the pairs of its own group alone. What seeds do is estimated from all groups
    that have a pair's seeds.

    Of groups without a single known question the runs' scores are compared, by seed alone.

    Returns:
        the comparisons, in the order of the groups; and the pairs that cannot be compared: they share no seed, or
        one where there are several.
    """
    some = any(group.known for group in groups.values())
    known = on_common_questions(groups) if some else {name: _whole(group) for name, group in groups.items()}
    least = min(max((len(group.seeds) for group in known.values()), default=1), 2)
    by_seeds: dict[tuple[int | None, ...], list[tuple[str, str]]] = {}
    pairs, apart = list(combinations(groups, 2)), []
    for first, second in pairs:
        seeds = _shared_seeds(known[first], known[second]) if first in known and second in known else ()
        if len(seeds) < least:
            apart.append((first, second))
        else:
            by_seeds.setdefault(seeds, []).append((first, second))
    found: dict[tuple[str, str], Comparison] = {}
    for seeds, chosen in by_seeds.items():
        having = {name: group for name, group in known.items() if set(seeds) <= set(group.seeds)}
        scores = {name: _at(group, seeds, group.ids) for name, group in having.items()}
        compared = paired_differences(scores, pairs=chosen) if some else _by_seed(scores, chosen)
        found |= {(each.first, each.second): each for each in compared}
    ordered = [found[pair] for pair in pairs if pair in found]
    adjusted = holm([each.difference.p for each in ordered])
    return [replace(each, adjusted=p) for each, p in zip(ordered, adjusted, strict=True)], apart


def unstable_of(groups: Mapping[str, Group]) -> tuple[str, ...]:
    """The groups that move far more with the seed than the others do, on the seeds that all of them have."""
    some = any(group.known for group in groups.values())
    known = on_common_questions(groups) if some else {name: _whole(group) for name, group in groups.items()}
    scores = matched(list(known.values())) if len(known) > 2 else None
    return unstable(dict(zip(known, scores, strict=True))) if scores and len(scores[0]) > 1 else ()


def _whole(group: Group) -> Group:
    """A group of which only the runs' scores are known, as if each were the answer to one question."""
    return replace(group, ids=("",), scores=group.values[:, None])


def _by_seed(scores: Mapping[str, Scores], pairs: Sequence[tuple[str, str]] | None = None) -> list[Comparison]:
    return differences_by_seed({name: of[:, 0] for name, of in scores.items()}, pairs=pairs)


def _shared_seeds(first: Group, second: Group) -> tuple[int | None, ...]:
    return tuple(seed for seed in first.seeds if seed in second.seeds)


def minus(first: Group, second: Group) -> Difference | Estimate | None:
    """First minus second, paired by seed and question; by seed alone where single questions are not known."""
    pair = matched([first, second]) if first.known and second.known else None
    if pair is not None:
        return difference(*pair)
    if first.known and second.known:
        return None  # no seed or no question in common
    whole = None if first.known or second.known else matched([_whole(first), _whole(second)])
    if whole is not None:
        return _by_seed({"first": whole[0], "second": whole[1]})[0].difference
    return Estimate(float(first.values.mean() - second.values.mean()))


def plain(found: Estimate) -> Estimate:
    """An estimate in Python's own numbers, which every writer of JSON knows."""
    if found.low is None or found.high is None:
        return Estimate(float(found.value))
    return Estimate(float(found.value), float(found.low), float(found.high))


def estimate(found: Difference | Estimate | None) -> Estimate | None:
    """A difference as an estimate."""
    if found is None or isinstance(found, Estimate):
        return found
    return Estimate(found.value, found.low, found.high)


def stacked(tasks: Sequence[Scores]) -> Scores:
    """Scores (S, Q) of several tasks as one array whose mean is the mean over tasks, each with the same weight.

    The tasks are those that there are; their seeds and their questions are samples. So a task's questions are
    weighted by how few they are, and stand at the mean of all tasks: what tasks differ by is no chance.

    Args:
        tasks: of the same S; a row is one seed in all of them.
    """
    whole = float(np.mean([of.mean() for of in tasks]))
    questions = sum(of.shape[1] for of in tasks)
    parts = [(of - of.mean()) * (questions / (len(tasks) * of.shape[1])) for of in tasks]
    joined: Scores = np.concatenate(parts, axis=1) + whole
    return joined
