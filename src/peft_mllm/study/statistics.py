"""95 % intervals of one run's score, and of the difference between two runs on the same questions.

The questions are the sample: an interval says how far a figure would move with other questions of the same
kind. It says nothing of other seeds; for that, run more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Of the bootstrap: the limits of an interval then move by a few hundredths of its width."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; without limits where the single questions are not known."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate_mean(scores: Sequence[float], *, value: float) -> Estimate:
    """The interval of a headline figure from its questions.

    Wilson's where every question is right or wrong: it stays sensible at 0 and 100 %, where a bootstrap's
    interval has no width. Graded scores are bootstrapped.

    Args:
        scores: per question; their mean is the headline up to a constant factor (100 for per cent).
        value: the headline figure; the interval is in its unit.
    """
    if not scores:
        return Estimate(value)
    low, high = _wilson(scores) if set(scores) <= {0.0, 1.0} else _bootstrap(np.asarray(scores))
    unit = _unit(scores, value)
    return Estimate(value, low * unit, high * unit)


def estimate_difference(first: Sequence[float], second: Sequence[float], *, value: float) -> Estimate:
    """The interval of the mean difference between two runs; questions are resampled in pairs.

    Args:
        first: scores of one run, in the headline's unit.
        second: of the other, on the same questions in the same order.
        value: the difference itself.
    """
    if not first:
        return Estimate(value)
    low, high = _bootstrap(np.asarray(first) - np.asarray(second))
    return Estimate(value, low, high)


def _unit(scores: Sequence[float], value: float) -> float:
    """What a mean score of 1 is in the headline's unit; 100 where the mean is 0 and does not say."""
    mean = sum(scores) / len(scores) if scores else 0.0
    return value / mean if mean else 100.0


def _wilson(scores: Sequence[float]) -> tuple[float, float]:
    """Wilson 1927: (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n); 0 and 1 at the ends."""
    questions, right = len(scores), round(sum(scores))
    share, z = right / questions, NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    centre = share + z * z / (2 * questions)
    half = z * sqrt(share * (1 - share) / questions + z * z / (4 * questions * questions))
    whole = 1 + z * z / questions
    low, high = (centre - half) / whole, (centre + half) / whole
    return (low if right else 0.0, high if right < questions else 1.0)


def _bootstrap(sample: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile interval of the sample's mean."""
    # imported here: it takes half a second, and `--help` passes by this module
    from scipy.stats import bootstrap  # type: ignore[import-untyped]

    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    outcome = bootstrap(
        [sample],
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(outcome.confidence_interval.low), float(outcome.confidence_interval.high)
