"""Differences between groups, paired by seed and question, and which of them are more than chance.

With several seeds the test is the two-way random-effects one of `variance`: a t test of the mean difference that
asks whether it would be found again with other seeds and other questions.

Two or three seeds say little of how much seeds matter. Groups that are compared in one family therefore share what
they show of it. With x[g, s] the mean of group g at seed s, taken over G groups and S seeds,

    pooled = Q sum (x[g, s] - x[g, .] - x[., s] + x[., .])^2 / ((G - 1)(S - 1)),    (G - 1)(S - 1) degrees of freedom

(the pooled error of Dorfman, Berbaum & Metz 1992). The mean square between seeds of a pair counts as its own or as
twice the pooled one (once, where one of the two has no seeds), whichever is larger (`variance.at_least`). The pooled
one alone would be too small for a method that is less stable than the others; the own alone is too small whenever
few seeds agree by chance, which among ten pairs happens all the time.

A group whose mean square is more than UNSTABLE^2 times that of the (lower) middle group is unstable: it is left out of
the pool, which it would widen for all others, and a pair whose own mean square is the larger has S - 1 degrees of
freedom in such a family. What is left, in simulated studies of five equal methods with three seeds: one of them being
twenty times less stable than the others 6 to 7 % claim something, two being fifteen times less stable up to 9 %;
with two seeds, one being twenty times less stable, up to 12 %: its two may agree by chance.

With one seed the test is over questions alone and blind to seeds: it tells two runs apart, not two methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from peft_mllm.study.inference.variance import (
    Scores,
    Seeds,
    Spread,
    as_scores,
    margin,
    p_value,
    quantile,
    spread_of_mean,
    table,
)

LEVEL = 0.05
"""Of all claims of a family together; 95 % intervals are its counterpart."""

UNSTABLE = 3.0
"""Times as much as the middle group's is the deviation over seeds of a group from which the others are kept apart."""


@dataclass(frozen=True)
class Difference:
    """A mean difference.

    Attributes:
        value: first minus second, in the unit of the scores.
        low, high: its 95 % interval; None where nothing varies to measure it by: one question, or all equal.
        p: two-sided, of there being none; not adjusted for others.
        seeds, questions: how many it rests on. With one seed it says nothing of seeds, with no question nothing of
            questions.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    seeds: int
    questions: int


@dataclass(frozen=True)
class Comparison:
    """Two groups of a family of comparisons.

    Attributes:
        adjusted: p after Holm's correction for the whole family.
    """

    first: str
    second: str
    difference: Difference
    adjusted: float

    @property
    def told_apart(self) -> bool:
        """Whether the groups differ by more than chance, all comparisons of the family considered."""
        return self.adjusted < LEVEL


def difference(first: ArrayLike, second: ArrayLike) -> Difference:
    """Compare two groups.

    - S >= 2: the two-way random-effects t test.
    - S = 1, differences of one size (right or wrong): the exact sign test, which is McNemar's exact test; the
      interval is Bonett & Price's (2012).
    - S = 1, graded: the paired t test over questions.
    - No variance at all: p = 1 where all is equal; where all differ by the same, 2^(1 - Q) as in the sign test.

    Args:
        first: (S, Q). What has no seeds (zero-shot) is broadcast to S equal rows by the caller, who knows that it
            has none.
        second: (S, Q); row s with the data order of the first's row s, column q the same question.

    Raises:
        ValueError: the shapes differ.
    """
    return compared(_paired(as_scores(first), as_scores(second)))


def paired_differences(
    groups: Mapping[str, ArrayLike], *, pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Compare groups in pairs, with Holm's correction over all of them.

    Args:
        groups: (S, Q) by name, all of one shape. A group whose rows are all equal has no seeds, like zero-shot.
        pairs: which to compare; all, if not given. A smaller family has more power: all against zero-shot, say.

    Raises:
        ValueError: the shapes differ.
    """
    scores = {name: as_scores(of) for name, of in groups.items()}
    return _family(scores, pairs, compared)


def differences_by_seed(
    groups: Mapping[str, ArrayLike], *, pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Likewise where only the scores of whole runs are known: t tests over seeds, blind to questions.

    Args:
        groups: (S,) by name, paired by seed, S >= 2.
        pairs: which to compare; all, if not given.
    """
    scores = {name: as_scores(np.asarray(of)[:, None]) for name, of in groups.items()}
    return _family(scores, pairs, _compared_by_seed)


def _family(
    scores: Mapping[str, Scores], pairs: Iterable[tuple[str, str]] | None, test: Callable[..., Difference]
) -> list[Comparison]:
    chosen = list(combinations(scores, 2) if pairs is None else pairs)
    pool = _Pool.of(scores)
    found = [test(_paired(scores[a], scores[b]), between=pool.between(a, b) if pool else None) for a, b in chosen]
    adjusted = holm([each.p for each in found])
    return [Comparison(a, b, each, corrected) for (a, b), each, corrected in zip(chosen, found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: the chance of any false claim among all stays below the level."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def compared(differences: Scores, *, between: Seeds | None = None) -> Difference:
    """Test whether differences (S, Q) have a mean of 0.

    Args:
        differences: (S, Q), paired.
        between: what the groups of the family show of seeds; the larger mean square counts.
    """
    seeds, questions = differences.shape
    of = table(differences)
    spread = spread_of_mean(of, between=between)
    if seeds == 1 or spread.variance == 0.0:
        signs = _signs(differences[0])
        if signs is not None:
            return _signed(differences[0], signs, of.mean, seeds)
    return from_spread(of.mean, spread, seeds=seeds, questions=questions)


def _compared_by_seed(differences: Scores, *, between: Seeds | None = None) -> Difference:
    """Test whether the differences of whole runs (S, 1) have a mean of 0."""
    of, seeds = table(differences), len(differences)
    spread = spread_of_mean(of, between=between)
    if seeds == 1 or spread.variance == 0.0:
        return Difference(of.mean, None, None, 1.0, seeds, 0)
    half = margin(spread)
    return Difference(of.mean, of.mean - half, of.mean + half, p_value(of.mean, spread), seeds, 0)


def from_spread(value: float, spread: Spread, *, seeds: int, questions: int) -> Difference:
    """The t test of a value that is known with a spread."""
    if questions == 1 or spread.variance == 0.0:
        return Difference(value, None, None, 1.0, seeds, questions)
    half = margin(spread)
    return Difference(value, value - half, value + half, p_value(value, spread), seeds, questions)


def unstable(groups: Mapping[str, ArrayLike]) -> tuple[str, ...]:
    """The groups whose scores move far more with the seed than those of the middle group do.

    Args:
        groups: (S, Q) by name, all of one shape. The noise of single answers counts as moving, too.
    """
    tables = {name: table(as_scores(of)) for name, of in groups.items()}
    squares = {name: max(of.seeds, of.rest) for name, of in tables.items()}
    ordered = sorted(square for name, square in squares.items() if not _is_still(as_scores(groups[name])))
    middle = ordered[(len(ordered) - 1) // 2] if ordered else 0.0
    return tuple(name for name, square in squares.items() if 0 < UNSTABLE**2 * middle < square)


def shown_of_seeds(groups: Mapping[str, ArrayLike], first: str, second: str) -> Seeds | None:
    """What a family shows of the mean square between seeds of the differences of two groups; None for a pair alone."""
    pool = _Pool.of({name: as_scores(of) for name, of in groups.items()})
    return pool.between(first, second) if pool else None


@dataclass(frozen=True)
class _Pool:
    """What all groups of a family show of how much seeds matter.

    Attributes:
        square: mean square between seeds of one group, once what all groups share is taken off.
        moving: the groups that have seeds.
        mixed: some are unstable, and left out.
    """

    square: float
    freedom: int
    moving: frozenset[str]
    mixed: bool

    @classmethod
    def of(cls, groups: Mapping[str, Scores]) -> _Pool | None:
        """None where fewer than two groups have seeds, so that there is nothing to share."""
        _check_shapes(groups)
        moving = [name for name, scores in groups.items() if not _is_still(scores)]
        if len(moving) < 2:
            return None
        wild = unstable({name: groups[name] for name in moving})
        steady = [name for name in moving if name not in wild]
        if len(steady) < 2:
            steady = moving
        by_seed = np.stack([groups[name].mean(axis=1) for name in steady])  # (G, S)
        rest = by_seed - by_seed.mean(axis=0) - by_seed.mean(axis=1, keepdims=True) + by_seed.mean()
        seeds, questions = groups[moving[0]].shape
        freedom = (len(steady) - 1) * (seeds - 1)
        return cls(questions * float((rest * rest).sum()) / freedom, freedom, frozenset(moving), bool(wild))

    def between(self, first: str, second: str) -> Seeds | None:
        """What is to be expected of the differences of two groups; None where it is but what they show themselves."""
        if self.moving == {first, second}:
            return None
        return Seeds(self.square * len({first, second} & self.moving), self.freedom, self.mixed)


def _is_still(scores: Scores) -> bool:
    """Whether all rows are equal: there are no seeds, or they do nothing."""
    return not np.ptp(scores, axis=0).any()


def _check_shapes(groups: Mapping[str, Scores]) -> None:
    shapes = {scores.shape: name for name, scores in groups.items()}
    if len(shapes) > 1:
        listed = ", ".join(f"{name} {shape}" for shape, name in shapes.items())
        raise ValueError(f"groups that are compared have the same seeds and questions; here are {listed}")


def _paired(first: Scores, second: Scores) -> Scores:
    _check_shapes({"first": first, "second": second})
    return first - second


def _signs(differences: Scores) -> tuple[int, int, float] | None:
    """How many of (Q,) are above and below 0, and by what; None where they are of several sizes."""
    sizes = np.abs(differences[differences != 0])
    if sizes.size and np.ptp(sizes) > 1e-9 * sizes[0]:
        return None
    size = float(sizes[0]) if sizes.size else 0.0
    return int((differences > 0).sum()), int((differences < 0).sum()), size


def _signed(differences: Scores, signs: tuple[int, int, float], value: float, seeds: int) -> Difference:
    """The exact sign test, and Bonett & Price's interval: as if one question more were decided either way."""
    from scipy.special import bdtr  # type: ignore[import-untyped]

    above, below, size = signs
    questions = differences.size
    if size == 0.0:
        return Difference(value, None, None, 1.0, seeds, questions)
    p = min(1.0, 2 * float(bdtr(min(above, below), above + below, 0.5)))
    first, second = (above + 1) / (questions + 2), (below + 1) / (questions + 2)
    half = quantile(np.inf) * sqrt((first + second - (first - second) ** 2) / (questions + 2))
    low, high = max(first - second - half, -1.0) * size, min(first - second + half, 1.0) * size
    return Difference(value, low, high, p, seeds, questions)
