"""Lines over all tasks of a study, each task with the same weight: their mean, and how sure their order is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft_mllm.study.analysis import Overall, Rank
from peft_mllm.study.contest import TASK, Contest, Structure
from peft_mllm.study.inference.intervals import clipped, mean_interval
from peft_mllm.study.inference.ranks import rank_stability
from peft_mllm.study.outcomes import NOT_VARIED
from peft_mllm.study.overview import Row
from peft_mllm.study.pairing import Group, Scores, bounds_over, on_common_questions, plain, stacked

Named = Mapping[str, int]


def overall_of(structure: Structure, rows: Sequence[Row]) -> tuple[Overall, ...]:
    """Every line over the tasks that all lines of its block of everything else have; of one task there is none."""
    gathered: dict[tuple[tuple[str, str], ...], list[Contest]] = {}
    for contest in structure.contests:
        others = tuple((axis, label) for axis, label in contest.factors.items() if axis != TASK)
        gathered.setdefault(others, []).append(contest)
    return tuple(
        found
        for contests in gathered.values()
        if len(contests) > 1
        for found in _overall([_scored(contest, rows, structure) for contest in contests], rows)
    )


def _scored(contest: Contest, rows: Sequence[Row], structure: Structure) -> Named:
    return {structure.name(place): place for place in contest.members if (own := rows[place].own) and own.known}


def _overall(tasks: Sequence[Named], rows: Sequence[Row]) -> Iterator[Overall]:
    names, tasks = _complete(tasks)
    if not names or len(tasks) < 2:
        return
    groups = [
        on_common_questions({name: own for name in names if (own := rows[task[name]].own) is not None})
        for task in tasks
    ]
    names = [name for name in names if all(name in task for task in groups) and _seeds(name, groups)]
    if not names:
        return
    scores = [{name: _points(task[name], _seeds(name, groups)) for name in names} for task in groups]
    ranks = rank_stability(scores).ranks
    for name, rank in ranks.items():
        bounds = bounds_over([task[name] for task in groups])
        factors = _shared([rows[task[name]].cell.factors for task in tasks])
        yield Overall(
            factors=factors,
            score=plain(clipped(mean_interval(stacked([task[name] for task in scores])), bounds)),
            rank=Rank(name, rank.mean, rank.low, rank.high, rank.first),
            tasks=len(tasks),
        )


def _seeds(name: str, tasks: Sequence[Mapping[str, Group]]) -> list[int | None]:
    """Those that a line has in every task."""
    return [seed for seed in tasks[0][name].seeds if all(seed in task[name].seeds for task in tasks)]


def _points(group: Group, seeds: Sequence[int | None]) -> Scores:
    """(S, Q) in points of a hundred."""
    rows = [group.seeds.index(seed) for seed in seeds]
    scores: Scores = group.scores[rows] * group.points
    return scores


def _complete(tasks: Sequence[Named]) -> tuple[list[str], list[Named]]:
    """The tasks that every line has; where that are fewer than two, the lines that every task has."""
    every = list(dict.fromkeys(name for task in tasks for name in task))
    whole = [task for task in tasks if all(name in task for name in every)]
    if len(whole) > 1:
        return every, whole
    return [name for name in every if all(name in task for task in tasks)], list(tasks)


def _shared(factors: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {
        axis: label
        for axis, label in factors[0].items()
        if axis != TASK and label != NOT_VARIED and all(each.get(axis) == label for each in factors)
    }
