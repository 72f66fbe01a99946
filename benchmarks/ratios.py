"""From seconds in pairs to a ratio with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """How many times as long the other takes.

    Attributes:
        median: of the pairs' ratios.
        low, high: its 95 % interval, by bootstrap over the pairs.
        pairs: how many.
    """

    median: float
    low: float
    high: float
    pairs: int


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of seconds taken in turn; the n-th of both belong together, and one may have ended earlier."""
    pairs = min(len(theirs), len(ours))
    ratios = np.array(theirs[:pairs]) / np.array(ours[:pairs])
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
