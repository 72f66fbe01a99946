"""The effect of a factor, such as the connector being tuned instead of frozen: from matched cells.

A cell is two groups that are equal in everything but the factor. Its effect is a paired difference; the pooled
effect is the mean over cells, each with the same weight. The cells are those of the study, not a sample of methods:
the interval is over other seeds and questions. How far cells differ is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from peft_mllm.study.inference.differences import LEVEL, Difference, compared, from_spread, holm
from peft_mllm.study.inference.variance import (
    Scores,
    Seeds,
    Spread,
    as_scores,
    quantile,
    spread_of_mean,
    table,
    weighted,
)


@dataclass(frozen=True)
class Cell:
    """Two groups that differ in the factor alone.

    Attributes:
        name: what they share, like the method and the model.
        task: cells of one task have the same questions in the same order, and the same seeds.
        after, before: (S, Q), with the factor changed and without.
        between: what all groups that both are compared with show of seeds (`differences.shown_of_seeds`), if those
            are known; the cells of the task show it otherwise.
    """

    name: str
    task: str
    after: ArrayLike
    before: ArrayLike
    between: Seeds | None = None


@dataclass(frozen=True)
class CellEffect:
    """One cell's effect; `adjusted` is its p after Holm's correction over all cells."""

    name: str
    task: str
    difference: Difference
    adjusted: float


@dataclass(frozen=True)
class Effect:
    """The effect of a factor.

    Attributes:
        pooled: the mean over cells; `seeds` is the least of a task, `questions` the sum over tasks.
        cells: in the order given.
        same_sign: no cell's value lies on the other side of 0.
        gains, losses: in how many cells the effect is more than chance, all cells considered.
        differ: p of all cells having the same effect (Welch's 1951 test: Cochran's Q, for variances that are known
            from few seeds only); None for one cell.
        between: standard deviation of the true effects between cells, beyond what seeds and questions explain
            (DerSimonian & Laird 1986); None for one cell.
        expected: 95 % interval of the effect in another cell of the kind (Higgins, Thompson & Spiegelhalter 2009);
            None for fewer than three cells.
    """

    pooled: Difference
    cells: tuple[CellEffect, ...]
    same_sign: bool
    gains: int
    losses: int
    differ: float | None
    between: float | None
    expected: tuple[float, float] | None


def factor_effect(cells: Sequence[Cell]) -> Effect:
    """Measure a factor's effect: after minus before.

    Cells of one task share its questions, so they are averaged before they are tested. What their seeds show is
    shared: the mean square between seeds is that of the average or that which the single cells lead to expect,
    whichever is larger, with the degrees of freedom of all.

    Raises:
        ValueError: no cell, or the shapes within a task differ.
    """
    if not cells:
        raise ValueError("an effect is measured on at least one cell")
    by_task = _by_task(cells)
    pools = {task: _pool(found, cells) for task, found in by_task.items()}
    tested = [compared(by_task[cell.task][place], between=pools[cell.task]) for place, cell in enumerate(cells)]
    found = tuple(
        CellEffect(cell.name, cell.task, each, adjusted)
        for cell, each, adjusted in zip(cells, tested, holm([each.p for each in tested]), strict=True)
    )
    values = np.array([each.value for each in tested])
    clear = [each.difference.value for each in found if each.adjusted < LEVEL]
    spreads = [_spread(by_task[cell.task][place], pools[cell.task]) for place, cell in enumerate(cells)]
    differ, between, expected = _heterogeneity(values, spreads)
    return Effect(
        pooled=_pooled([list(each.values()) for each in by_task.values()], list(pools.values())),
        cells=found,
        same_sign=bool((values >= 0).all() or (values <= 0).all()),
        gains=sum(value > 0 for value in clear),
        losses=sum(value < 0 for value in clear),
        differ=differ,
        between=between,
        expected=expected,
    )


def _by_task(cells: Sequence[Cell]) -> Mapping[str, dict[int, Scores]]:
    """The differences (S, Q) of each cell, by task and by the cell's place."""
    found: dict[str, dict[int, Scores]] = {}
    for place, cell in enumerate(cells):
        after, before = as_scores(cell.after), as_scores(cell.before)
        of = found.setdefault(cell.task, {})
        if after.shape != before.shape or any(each.shape != after.shape for each in of.values()):
            raise ValueError(f"cells of {cell.task} have the same seeds and questions; {cell.name} has others")
        of[place] = after - before
    return found


def _pool(differences: Mapping[int, Scores], cells: Sequence[Cell]) -> Seeds | None:
    """What the cells of a task show of seeds together; None for one seed."""
    seeds = len(next(iter(differences.values())))
    if seeds == 1:
        return None
    shown = [cells[place].between or Seeds(table(each).seeds, seeds - 1) for place, each in differences.items()]
    mixed = any(each.mixed for each in shown)
    return Seeds(float(np.mean([each.square for each in shown])), sum(each.freedom for each in shown), mixed)


def _pooled(tasks: Sequence[Sequence[Scores]], pools: Sequence[Seeds | None]) -> Difference:
    count = sum(map(len, tasks))
    means = [np.mean(of, axis=0) for of in tasks]  # (S, Q) each
    expected = [pool and replace(pool, square=pool.square / len(of)) for of, pool in zip(tasks, pools, strict=True)]
    if len(tasks) == 1:
        return compared(means[0], between=expected[0])
    weights = [len(of) / count for of in tasks]
    spread = weighted([_spread(each, pool) for each, pool in zip(means, expected, strict=True)], weights)
    value = float(sum(weight * each.mean() for weight, each in zip(weights, means, strict=True)))
    seeds, questions = min(map(len, means)), sum(each.shape[1] for each in means)
    return from_spread(value, spread, seeds=seeds, questions=questions)


def _spread(differences: Scores, pool: Seeds | None) -> Spread:
    return spread_of_mean(table(differences), between=pool)


def _heterogeneity(
    values: Scores, spreads: Sequence[Spread]
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Welch's test, the deviation between cells, and the interval of another cell's effect."""
    from scipy.special import fdtrc  # type: ignore[import-untyped]

    variances = np.array([each.variance for each in spreads])
    if len(values) < 2 or not variances.all():
        return None, None, None
    precision = 1 / variances
    centre = float(precision @ values / precision.sum())
    excess = float(precision @ (values - centre) ** 2)
    freedom = len(values) - 1
    scale = float(precision.sum() - (precision @ precision) / precision.sum())
    between = max(0.0, (excess - freedom) / scale)
    weights = 1 / (variances + between)
    centre = float(weights @ values / weights.sum())
    expected = None
    if len(values) > 2:
        half = quantile(len(values) - 2) * sqrt(between + 1 / float(weights.sum()))
        expected = (centre - half, centre + half)
    # Welch 1951: how much less is known than the variances pretend
    doubt = float((((1 - precision / precision.sum()) ** 2) / [each.freedom for each in spreads]).sum())
    square = len(values) ** 2 - 1
    ratio = excess / freedom / (1 + 2 * (freedom - 1) / square * doubt)
    return float(fdtrc(freedom, square / (3 * doubt), ratio)), sqrt(between), expected
