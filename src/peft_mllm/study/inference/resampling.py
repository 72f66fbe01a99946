"""The hierarchical bootstrap over seeds and questions, as products of matrices.

Each draw takes Q questions of the Q with replacement, for all groups of a task the same ones, and S seeds of the S.
Taking cells (seed, question) of a product of both would count the noise of single answers about three times (Owen
2007). So questions are drawn as they are, with their mean over the seeds, which carries that noise once; and seeds
are drawn as residuals, reflated to the variance that the two-way table gives to seeds alone (Carpenter, Goldstein &
Rasbash 2003): with S seeds, sqrt(S / (S - 1)) more than they show, less what single answers alone would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np

from peft_mllm.study.inference.variance import Scores, table
from peft_mllm.study.statistics import RESAMPLES

MOST_BLOCKS = 1000
"""More questions than this are drawn in so many blocks; the variance of a mean is the same, and is known to 5 %."""


def draw_means(groups: Sequence[Scores], *, stream: int = 0) -> Scores:
    """Draw the groups' means.

    Args:
        groups: of one task, each (S, Q); S may differ between groups, Q not.
        stream: other streams are independent draws; the same stream is always the same draws.

    Returns:
        (D, G): draw by group.
    """
    return _from_questions(groups, stream) + _from_seeds(groups, stream)


def _from_questions(groups: Sequence[Scores], stream: int) -> Scores:
    """(D, G): the means over the drawn questions."""
    by_question = np.stack([scores.mean(axis=0) for scores in groups])  # (G, Q)
    questions = by_question.shape[1]
    blocks = min(questions, MOST_BLOCKS)
    sizes = np.bincount(np.arange(questions) % blocks)  # (B,)
    if blocks < questions:
        padding = np.zeros((len(groups), -questions % blocks))
        by_question = np.concatenate([by_question, padding], axis=1).reshape(len(groups), -1, blocks).sum(axis=1)
    weights = _weights(blocks, stream)  # (D, B)
    # einsum adds in one order: a product of BLAS would differ in its last digits from one number of threads to another
    means: Scores = np.einsum("db,gb->dg", weights, by_question) / np.einsum("db,b->d", weights, sizes)[:, None]
    return means


def _from_seeds(groups: Sequence[Scores], stream: int) -> Scores:
    """(D, G): what the drawn seeds move the means by."""
    moved = np.zeros((RESAMPLES, len(groups)))
    for column, scores in enumerate(groups):
        seeds = len(scores)
        if seeds > 1:
            weights = _weights(seeds, stream + 1_000_003) / seeds  # (D, S)
            moved[:, column] = weights @ _residuals(scores)
    return moved


def _residuals(scores: Scores) -> Scores:
    """(S,): the seeds' effects, centred, with the variance that belongs to seeds alone."""
    of = table(scores)
    if of.seeds <= of.rest:
        return np.zeros(len(scores))
    by_seed = scores.mean(axis=1)
    residuals: Scores = (by_seed - by_seed.mean()) * sqrt((1 - of.rest / of.seeds) * len(scores) / (len(scores) - 1))
    return residuals


@lru_cache(maxsize=16)
def _weights(items: int, stream: int) -> Scores:
    """(D, N): how often each draw takes each of N items when it takes N of them."""
    drawn = np.random.default_rng([stream, items]).integers(0, items, (RESAMPLES, items))
    places = drawn + items * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(places.ravel(), minlength=RESAMPLES * items)
    return counts.reshape(RESAMPLES, items).astype(np.float64)
