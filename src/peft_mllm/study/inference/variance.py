"""How far a mean over seeds and questions is from the truth: the two-way random-effects model.

Readers and cases in radiology are seeds and questions here: both are samples, and a claim shall hold for others of
their kind. With score[s, q] = mean + seed[s] + question[q] + rest[s, q], the mean over S seeds and Q questions has

    variance = (MS_seeds + MS_questions - MS_rest) / (S Q)

with the mean squares of the two-way table (Dorfman, Berbaum & Metz 1992; Obuchowski & Rockette 1995; the degrees of
freedom after Satterthwaite 1946 and Hillis 2007). Three changes, each because simulated studies of equal methods
claimed differences in more than 5 % of the cases without it:

- Two or three seeds that agree by chance do not show that seeds agree: MS_seeds counts as at least MS_rest, which
  is its expectation where seeds have no effect at all, in the variance and in the degrees of freedom.
- MS_questions counts as at least MS_rest, likewise (so do Dorfman, Berbaum & Metz).
- Where several groups are compared, MS_seeds is at least what all of them show of it, see `differences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_mllm.study.statistics import CONFIDENCE

Scores: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The mean and the mean squares of scores (S, Q).

    Attributes:
        seeds: mean square between seeds, S - 1 degrees of freedom; 0 for one seed.
        questions: mean square between questions, Q - 1 degrees of freedom; 0 for one question.
        rest: mean square of what neither explains; for one seed it cannot be told from `questions`, and is 0.
    """

    mean: float
    seeds: float
    questions: float
    rest: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, and the degrees of freedom with which it is known."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Seeds:
    """A mean square between seeds, and its degrees of freedom.

    Attributes:
        mixed: it is of groups of which some are far less stable than the others, so that of a table with more nothing
            is known but what it shows itself.
    """

    square: float
    freedom: float
    mixed: bool = False


def at_least(own: Seeds, shared: Seeds | None) -> Seeds:
    """The mean square between seeds: a table's own, or what others show of it, whichever is larger.

    The larger one comes with what is known of it. Of an own one that is larger, the part up to the shared one has the
    shared degrees of freedom and what is beyond it has the own ones (Satterthwaite 1946); where groups are mixed, all
    of it has the own ones.
    """
    if shared is None:
        return own
    if own.square <= shared.square:
        return shared
    if shared.mixed:
        return own
    beyond = own.square - shared.square
    doubt = shared.square**2 / shared.freedom + beyond**2 / own.freedom
    return Seeds(own.square, own.square**2 / doubt)


def as_scores(scores: object) -> Scores:
    """Scores as an array (S, Q) of finite figures.

    Raises:
        ValueError: not two axes, nothing in it, or not finite.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"scores have two axes, seeds and questions; these have the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("scores are finite figures; a question without one is left out of all groups")
    return array


def table(scores: Scores) -> Table:
    """The two-way table of scores (S, Q)."""
    seeds, questions = scores.shape
    mean = float(scores.mean())
    if np.ptp(scores) == 0:  # rounding would leave a variance of 1e-30 that a test takes for knowledge
        return Table(float(scores[0, 0]), 0.0, 0.0, 0.0, (seeds, questions))
    by_seed = scores.mean(axis=1) - mean  # (S,)
    by_question = scores.mean(axis=0) - mean  # (Q,)
    rest = scores - mean - by_seed[:, None] - by_question  # (S, Q)
    return Table(
        mean,
        questions * float(by_seed @ by_seed) / max(seeds - 1, 1),
        seeds * float(by_question @ by_question) / max(questions - 1, 1),
        float((rest * rest).sum()) / max((seeds - 1) * (questions - 1), 1),
        (seeds, questions),
    )


def spread_of_mean(of: Table, *, between: Seeds | None = None) -> Spread:
    """How far the table's mean is from the truth.

    Args:
        of: the scores' or the differences' table.
        between: what others show of the mean square between seeds; see `at_least`.
    """
    seeds, questions = of.shape
    cells = seeds * questions
    if seeds == 1:
        return Spread(of.questions / cells, max(questions - 1, 1))
    known = at_least(Seeds(of.seeds, seeds - 1), between)
    part = max(known.square, of.rest)
    whole = part + max(of.questions - of.rest, 0.0)
    if whole == 0.0:
        return Spread(0.0, inf)
    share = part / whole
    return Spread(whole / cells, 1 / (share**2 / known.freedom + (1 - share) ** 2 / max(questions - 1, 1)))


def weighted(spreads: Sequence[Spread], weights: Sequence[float]) -> Spread:
    """The spread of a weighted sum of independent estimates, degrees of freedom after Satterthwaite 1946."""
    parts = [(weight**2 * each.variance, each.freedom) for each, weight in zip(spreads, weights, strict=True)]
    whole = sum(part for part, _ in parts)
    if whole == 0.0:
        return Spread(0.0, inf)
    return Spread(whole, 1 / max(sum((part / whole) ** 2 / freedom for part, freedom in parts), 1e-12))


def margin(spread: Spread) -> float:
    """Half the width of the 95 % interval."""
    return sqrt(spread.variance) * quantile(spread.freedom)


def quantile(freedom: float) -> float:
    """What a t interval of 95 % multiplies its standard error with."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(min(freedom, 1e12), 0.5 + CONFIDENCE / 2))


def p_value(value: float, spread: Spread) -> float:
    """Two-sided, of the truth being 0. The variance is not 0."""
    from scipy.special import stdtr

    return float(2 * stdtr(min(spread.freedom, 1e12), -abs(value) / sqrt(spread.variance)))
