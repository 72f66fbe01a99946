"""A group's mean with its interval, and its spread over seeds."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
from numpy.typing import ArrayLike

from peft_mllm.study.inference.resampling import draw_means
from peft_mllm.study.inference.variance import Scores, as_scores, quantile, spread_of_mean, table
from peft_mllm.study.statistics import CONFIDENCE, Estimate, estimate_mean

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-inf, inf)


def mean_interval(scores: ArrayLike) -> Estimate:
    """The mean over seeds and questions with its 95 % interval.

    With several seeds the interval is of the hierarchical bootstrap, expanded: few seeds make percentiles too
    narrow (Hesterberg 2015, "expanded percentile interval"), so their distances from the mean are scaled to the
    standard error of the two-way model times t / z. It says how far the figure moves with other seeds and other
    questions. With one seed it says nothing of seeds: Wilson's interval where every answer is right or wrong,
    otherwise a bootstrap over questions.

    In simulated studies of 320 questions it covers the truth in 94 % of the cases or more where runs differ by up
    to 3 points over seeds. Where they differ by 8 points, 5 seeds cover it in 94 %, 3 in 90 to 93 %, 2 in 87 to 93 %.

    Args:
        scores: (S, Q), in the headline's unit; right is the same figure everywhere, wrong is 0.
    """
    of = as_scores(scores)
    value = float(of.mean())
    right = _right(of)
    if right and (len(of) == 1 or np.ptp(of) == 0):
        return estimate_mean(list(of[0] / right), value=value)
    if of.shape[1] == 1 or np.ptp(of) == 0:
        return Estimate(value)
    low, high = _expanded(of, value)
    return Estimate(value, max(low, 0.0), min(high, right)) if right else Estimate(value, low, high)


def interval_by_seed(values: ArrayLike) -> Estimate:
    """The mean of whole runs' scores (S,) with its t interval over seeds; it says nothing of other questions."""
    of = np.asarray(values, dtype=np.float64)
    value = float(of.mean())
    if of.size < 2:
        return Estimate(value)
    half = quantile(of.size - 1) * float(of.std(ddof=1)) / sqrt(of.size)
    return Estimate(value, value - half, value + half)


def clipped(found: Estimate, bounds: Bounds) -> Estimate:
    """An interval without what lies beyond the least and the most that the figure can be; it covers as much."""
    if found.low is None or found.high is None:
        return found
    low, high = min(bounds[0], found.value), max(bounds[1], found.value)
    return Estimate(found.value, max(found.low, low), min(found.high, high))


def spread(scores: ArrayLike) -> float | None:
    """The standard deviation of the runs' means over seeds (S - 1 below the fraction); None for one seed."""
    of = as_scores(scores)
    return float(of.mean(axis=1).std(ddof=1)) if len(of) > 1 else None


def _expanded(scores: Scores, value: float) -> tuple[float, float]:
    moved = draw_means([scores])[:, 0] - value  # (D,)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(moved, [tail, 1 - tail])
    whole = spread_of_mean(table(scores))
    wider = sqrt(whole.variance) / moved.std() * quantile(whole.freedom) / quantile(inf)
    return value + wider * float(low), value + wider * float(high)


def _right(scores: Scores) -> float | None:
    """What a right answer scores where all are right or wrong: 1 or 100; None where they are graded."""
    most = float(scores.max()) or 1.0
    return most if most in (1.0, 100.0) and np.isin(scores, (0.0, most)).all() else None
