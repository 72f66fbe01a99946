"""Claims on stability: whether the score moves more with the seed at one end of a range than at the other.

With s the standard deviation of a run's mean over seeds, the ratio of two pooled s^2 is compared with the F
distribution. Three seeds leave two degrees of freedom: a ratio below 39 is then no evidence, which is why the
paper's own standard deviations decide little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from peft_mllm.study.inference.differences import holm
from peft_mllm.study.paper.evidence import LEVEL, Finding, Tasks, decided, nothing
from peft_mllm.study.paper.matching import Pair


@dataclass(frozen=True)
class Ratio:
    """Two pooled standard deviations over seeds, in points, of which the first is claimed to be the smaller."""

    what: str
    smaller: float
    larger: float
    p: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.what}: SD over {self.seeds} seeds {self.smaller:.2f} against {self.larger:.2f} (p {self.p:.2f})"


def steadier(what: str, cells: Sequence[Pair], tasks: Tasks) -> Ratio | None:
    """Compare the variance over seeds of the first and the second group of matched cells, pooled over cells.

    Returns:
        None where no cell has two seeds on both sides.
    """
    sums, freedoms, seeds = [0.0, 0.0], [0, 0], 0
    for pair in cells:
        for task in tasks(pair[0]):
            scored = [group.scored(task) for group in pair]
            means = [each.scores.mean(axis=1) for each in scored if each is not None and len(each.seeds) > 1]
            if len(means) < 2:
                continue
            for side, mean in enumerate(means):
                sums[side] += float(mean.var(ddof=0)) * len(mean)
                freedoms[side] += len(mean) - 1
            seeds = max(seeds, *map(len, means))
    if not all(freedoms):
        return None
    first, second = (total / freedom for total, freedom in zip(sums, freedoms, strict=True))
    if first == second:
        p = 1.0
    elif not (first and second):
        p = 0.0
    else:
        p = _two_sided(first / second, *freedoms)
    return Ratio(what, sqrt(first), sqrt(second), p, seeds)


def _two_sided(ratio: float, first: int, second: int) -> float:
    """Of a ratio of variances with these degrees of freedom being 1."""
    from scipy.special import fdtr, fdtrc  # type: ignore[import-untyped]

    return 2 * min(float(fdtr(first, second, ratio)), float(fdtrc(first, second, ratio)))


def all_steadier(ratios: Sequence[Ratio | None]) -> Finding:
    """Holds where each is told apart and as claimed; fails where one is told apart and the other way round."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return nothing()
    told = [
        0 if p >= LEVEL else 1 if ratio.smaller < ratio.larger else -1
        for ratio, p in zip(known, holm([ratio.p for ratio in known]), strict=True)
    ]
    return decided(told, whole=len(known) == len(ratios), because="; ".join(map(str, known)))
