"""Views in which lines spend the same: as many parameters, or as much time.

Parameters: where a line's rivals come in several sizes, each rival is shown at its size nearest below the line's
own. Time: every line stops when the fastest run of its block is done, since that long all seeds of all lines trained,
and shows the lowest validation loss that it had reached by then. A line of which a seed was not yet evaluated by then
is left out: its other seeds are its fast ones, and none would be fair to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import numpy as np

from peft_mllm.study.analysis import Matched
from peft_mllm.study.contest import Contest, Structure
from peft_mllm.study.inference.intervals import clipped, interval_by_seed
from peft_mllm.study.ledger import SECONDS, TRAINABLE
from peft_mllm.study.outcomes import FULL, Outcome
from peft_mllm.study.overview import Row

PARAMETERS = "parameters"
TIME = "time"
LOSSES = (0.0, inf)


def matched_views(structure: Structure, rows: Sequence[Row]) -> tuple[Matched, ...]:
    """Both views of every block that has more than one line to show."""
    return tuple(
        row
        for contest in structure.contests
        for row in (*_by_parameters(contest, rows, structure.contrast), *_by_time(contest, rows, structure))
    )


def _by_parameters(contest: Contest, rows: Sequence[Row], contrast: str) -> Iterator[Matched]:
    sizes: dict[str, list[tuple[float, Row]]] = {}
    for place in contest.members:
        row = rows[place]
        label, spent = row.cell.factors.get(contrast, ""), row.mean_of(TRAINABLE)
        if row.score is not None and spent is not None and label != FULL:
            sizes.setdefault(label, []).append((spent, row))
    if len(sizes) < 2 or all(len(of) == 1 for of in sizes.values()):
        return
    for budget in sorted({spent for of in sizes.values() for spent, _ in of}):
        fitting = [max((each for each in of if each[0] <= budget), key=_size, default=None) for of in sizes.values()]
        chosen = [each for each in fitting if each is not None]
        if len(chosen) < 2:
            continue
        for spent, row in chosen:
            if row.score is not None:
                seeds = len(row.cell.outcomes)
                yield Matched(PARAMETERS, budget, contest.factors, row.cell.factors, row.score, spent, seeds)


def _size(spent_by: tuple[float, Row]) -> float:
    return spent_by[0]


def _by_time(contest: Contest, rows: Sequence[Row], structure: Structure) -> Iterator[Matched]:
    budget, reached = _within_time(contest, rows)
    if budget is None or len(reached) < 2:
        return
    missing = tuple(structure.name(place) for place in contest.members if place not in reached)
    for place, found in reached.items():
        value = clipped(interval_by_seed([loss for loss, _ in found]), LOSSES)
        spent = float(np.mean([seconds for _, seconds in found]))
        yield Matched(TIME, budget, contest.factors, rows[place].cell.factors, value, spent, len(found), missing)


def without_time(structure: Structure, rows: Sequence[Row]) -> list[Contest]:
    """The blocks in which fewer than two lines can be shown with equal time, though they were timed and evaluated."""
    found = []
    for contest in structure.contests:
        budget, reached = _within_time(contest, rows)
        runs = [outcome for place in contest.members for outcome in rows[place].cell.outcomes]
        evaluated = any(point.eval_loss is not None for run in runs if run.result for point in run.result.points)
        if budget is not None and len(reached) < 2 and evaluated:
            found.append(contest)
    return found


def _within_time(
    contest: Contest, rows: Sequence[Row]
) -> tuple[float | None, Mapping[int, Sequence[tuple[float, float]]]]:
    """The seconds that all runs trained, and what each line had reached by then with every one of its seeds."""
    runs = {place: rows[place].cell.outcomes for place in contest.members}
    seconds = {place: [outcome.figures.get(SECONDS, 0.0) for outcome in found] for place, found in runs.items()}
    timed = {place: min(found) for place, found in seconds.items() if all(found)}
    if len(timed) < 2:
        return None, {}
    budget = min(timed.values())
    reached = {place: [_lowest_loss(outcome, budget) for outcome in runs[place]] for place in timed}
    whole = {place: [each for each in found if each is not None] for place, found in reached.items()}
    return budget, {place: found for place, found in whole.items() if len(found) == len(runs[place])}


def _lowest_loss(outcome: Outcome, budget: float) -> tuple[float, float] | None:
    """The lowest validation loss within so many seconds of training, and when it was measured."""
    points = outcome.result.points if outcome.result else ()
    clock: Mapping[int, float] = {point.step: point.seconds for point in points if point.seconds is not None}
    steps = sorted(clock)
    if not steps:
        return None
    seconds = [clock[step] for step in steps]
    losses = [
        (point.eval_loss, float(np.interp(point.step, steps, seconds)))
        for point in points
        if point.eval_loss is not None
    ]
    return min((each for each in losses if each[1] <= budget), default=None)
