"""Views in which lines spend the same: as many parameters, or as much time.

Parameters: where a line's rivals come in several sizes, each rival is shown at its size nearest below the line's
own. Time: every line stops when the fastest of its block is done, and shows the lowest validation loss that it had
reached by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from peft_mllm.study.analysis import Matched
from peft_mllm.study.contest import Contest, Structure
from peft_mllm.study.inference.intervals import interval_by_seed
from peft_mllm.study.ledger import SECONDS, TRAINABLE
from peft_mllm.study.outcomes import FULL, Outcome
from peft_mllm.study.overview import Row

PARAMETERS = "parameters"
TIME = "time"


def matched_views(structure: Structure, rows: Sequence[Row]) -> tuple[Matched, ...]:
    """Both views of every block that has more than one line to show."""
    return tuple(
        row
        for contest in structure.contests
        for row in (*_by_parameters(contest, rows, structure.contrast), *_by_time(contest, rows))
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
                yield Matched(PARAMETERS, budget, row.cell.factors, row.score, spent)


def _size(spent_by: tuple[float, Row]) -> float:
    return spent_by[0]


def _by_time(contest: Contest, rows: Sequence[Row]) -> Iterator[Matched]:
    timed = {place: seconds for place in contest.members if (seconds := rows[place].mean_of(SECONDS))}
    if len(timed) < 2:
        return
    budget = min(timed.values())
    for place in timed:
        reached = [best for outcome in rows[place].cell.outcomes if (best := _lowest_loss(outcome, budget)) is not None]
        if reached:
            value = interval_by_seed([loss for loss, _ in reached])
            spent = float(np.mean([seconds for _, seconds in reached]))
            yield Matched(TIME, budget, rows[place].cell.factors, value, spent)


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
