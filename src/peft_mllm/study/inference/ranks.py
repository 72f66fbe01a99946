"""How sure a ranking of methods is: over other seeds and questions, and between the seeds there are.

Kendall & Babington Smith 1939 for the agreement of rankings (W: 0 none, 1 full), with their correction for ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from peft_mllm.study.inference.resampling import draw_means
from peft_mllm.study.inference.variance import Scores, as_scores
from peft_mllm.study.statistics import CONFIDENCE


@dataclass(frozen=True)
class Rank:
    """Where a method stands, 1 being best.

    Attributes:
        value: its rank by the means as they are.
        mean: its mean rank over the draws.
        low, high: where 95 % of the draws put it.
        first: the share of draws in which it is first; a tie for it is shared.
    """

    value: float
    mean: float
    low: float
    high: float
    first: float


@dataclass(frozen=True)
class Ranking:
    """The ranks by name, best first, and how far the seeds agree on them.

    Attributes:
        agreement: Kendall's W of the rankings by the single seeds; None for one seed or one method, or where all
            are tied.
    """

    ranks: Mapping[str, Rank]
    agreement: float | None


def rank_stability(tasks: Sequence[Mapping[str, ArrayLike]], *, more_is_better: bool = True) -> Ranking:
    """Rank methods by their mean over tasks, every task with the same weight.

    The draws are those of the hierarchical bootstrap: seeds and questions anew in each task, the same for all
    methods. Its ranks are a picture, not a test: with few seeds they look surer than they are; what may be claimed
    is said by `paired_differences`.

    Args:
        tasks: per task, (S, Q) by method; every task has the same methods.
        more_is_better: whether the highest mean is the best.

    Raises:
        ValueError: no task, or the methods differ.
    """
    names = list(tasks[0]) if tasks else []
    if not names or any(set(task) != set(names) for task in tasks):
        raise ValueError("methods are ranked over tasks that each of them has")
    scores = [[as_scores(task[name]) for name in names] for task in tasks]
    sign = 1.0 if more_is_better else -1.0
    means = np.mean([[of.mean() for of in task] for task in scores], axis=0)  # (M,)
    drawn = np.mean([draw_means(task, stream=place) for place, task in enumerate(scores)], axis=0)  # (D, M)
    value = _ranks(sign * means[None])[0]
    ranks = _ranks(sign * drawn)  # (D, M)
    best = ranks == ranks.min(axis=1, keepdims=True)
    first = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=0, method="nearest")
    found = {
        names[i]: Rank(float(value[i]), float(ranks[:, i].mean()), float(low[i]), float(high[i]), float(first[i]))
        for i in np.argsort(value, kind="stable")
    }
    return Ranking(found, kendalls_w(_by_seed(scores)))


def kendalls_w(scores: Scores) -> float | None:
    """Kendall's W of the rankings by each row.

    Args:
        scores: (judges, items), ranked within each row, ties with their mean rank.

    Returns:
        12 sum((R - mean R)^2) / (m^2 (n^3 - n) - m sum(t^3 - t)) of m judges, n items, rank sums R and groups of t
        tied items; None where there is nothing to agree on.
    """
    judges, items = scores.shape
    if judges < 2 or items < 2:
        return None
    ranks = _ranks(scores)
    sums = ranks.sum(axis=0)
    # for an item tied with t in all, t^2 - 1; over the t items of a tie, t^3 - t
    tied = float(((scores[:, :, None] == scores[:, None, :]).sum(axis=2) ** 2 - 1).sum())
    most = judges**2 * (items**3 - items) - judges * tied
    return float(12 * ((sums - sums.mean()) ** 2).sum() / most) if most > 0 else None


def _by_seed(tasks: Sequence[Sequence[Scores]]) -> Scores:
    """(S, M): each seed's means over tasks, for the seeds that all groups have."""
    seeds = min(len(of) for task in tasks for of in task)
    means: Scores = np.mean([[of[:seeds].mean(axis=1) for of in task] for task in tasks], axis=0).T
    return means


def _ranks(scores: Scores) -> Scores:
    """(D, M): ranks within each row, 1 the highest, ties with their mean rank."""
    columns = [
        (scores > of).sum(axis=1) + ((scores == of).sum(axis=1) + 1) / 2 for of in np.split(scores, scores.shape[1], 1)
    ]
    ranks: Scores = np.stack(columns, axis=1)
    return ranks
