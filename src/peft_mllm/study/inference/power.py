"""How much data a difference takes: the smallest one that a study of some size tells apart more often than not.

The variance of a mean difference is that of the two-way model (variance.py), from what runs usually differ by:

    variance = 2 seed_sd^2 / S  +  kept / Q  +  drawn / (S Q)

with differing * 100^2 = kept + drawn, where two runs give answers of which one is right and one wrong on a share
`differing` of the questions; a half of that is kept with other seeds. The smallest difference is the standard error
times the quantiles of t for the level (divided by the pairs, as Holm's first step does) and for the power.
"""

from __future__ import annotations

from math import sqrt

from peft_mllm.study.inference.differences import LEVEL
from peft_mllm.study.inference.variance import Seeds, Table, spread_of_mean

POWER = 0.9
"""What the formula asks for; simulated studies find 80 % then, since the test takes the larger of two mean squares."""
KEPT = 0.5
"""Of the variance of differing answers, what stays with another seed."""


def smallest_difference(
    seeds: int, questions: int, *, methods: int = 5, seed_sd: float = 1.0, differing: float = 0.2
) -> float:
    """Points of a difference between two methods that is told apart in about 80 % of such studies.

    Args:
        seeds: of each method, two or more.
        questions: of the test set.
        methods: that are compared, each with each.
        seed_sd: standard deviation of one method's score over seeds, in points.
        differing: share of the questions of which two runs get one right and one wrong.

    Raises:
        ValueError: one seed, which tells no two methods apart.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    if seeds < 2:
        raise ValueError("one seed tells no two methods apart, whatever the questions")
    kept, drawn = KEPT * differing * 1e4, (1 - KEPT) * differing * 1e4
    between = questions * 2 * seed_sd**2 + drawn
    of = Table(0.0, between, seeds * kept + drawn, drawn, (seeds, questions))
    spread = spread_of_mean(of, between=Seeds(between, (methods - 1) * (seeds - 1)))
    pairs = methods * (methods - 1) // 2
    quantiles = stdtrit(spread.freedom, 1 - LEVEL / pairs / 2) + stdtrit(spread.freedom, POWER)
    return float(sqrt(spread.variance) * quantiles)
