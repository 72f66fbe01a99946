"""BLEU, ROUGE-L and CIDEr-D of tokenised captions, to the last digit as the COCO caption scorer computes them.

Source: tylin/coco-caption (pycocoevalcap). Papineni et al. 2002, Lin 2004, Vedantam et al. 2015 (arXiv 1411.5726).
What it calls CIDEr is CIDEr-D with counts that are not normalised, and its length penalty counts bigrams. Its
document frequencies come from the references of the images that are scored: another subset, other figures.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LONGEST = 4
_SIGMA = 6.0
_BETA = 1.2
_SMALL = 1e-9  # in a denominator
_TINY = 1e-15  # in a numerator

Ngram = tuple[str, ...]


class Scores(NamedTuple):
    """The figure of all images, and of each."""

    corpus: float
    each: list[float]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scores]:
    """BLEU-1 to BLEU-4 with clipped counts and the closest reference's length; the shorter of two as close.

    Args:
        captions: one for each image, tokens joined by spaces.
        references: those of each image.
    """
    parts = [_bleu_counts(caption, refs) for caption, refs in zip(captions, references, strict=True)]
    total = _Counts(
        [sum(part.correct[n] for part in parts) for n in range(LONGEST)],
        [sum(part.guessed[n] for part in parts) for n in range(LONGEST)],
        sum(part.length for part in parts),
        sum(part.reference for part in parts),
    )
    corpus = _bleu(total)
    each = [_bleu(part) for part in parts]
    return [Scores(corpus[n], [scores[n] for scores in each]) for n in range(LONGEST)]


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """ROUGE-L: F with beta = 1.2 of the longest common subsequence; best precision and best recall taken apart."""
    each = [_rouge_l(caption, refs) for caption, refs in zip(captions, references, strict=True)]
    return Scores(sum(each) / len(each), each)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D: ten times the mean over n = 1..4 and references of a clipped cosine of tf-idf, penalised by length."""
    counts = [[_ngrams(ref.split()) for ref in refs] for refs in references]
    frequency: Counter[Ngram] = Counter()
    for image in counts:
        frequency.update({ngram for ref in image for ngram in ref})
    images = math.log(len(references))
    idf = {ngram: images - math.log(max(1.0, count)) for ngram, count in frequency.items()}
    each = []
    for caption, image in zip(captions, counts, strict=True):
        hypothesis = _Vector(_ngrams(caption.split()), idf, images)
        similar = [_similarity(hypothesis, _Vector(ref, idf, images)) for ref in image]
        each.append(10.0 * sum(similar) / len(similar))
    return Scores(sum(each) / len(each), each)


class _Counts(NamedTuple):
    correct: list[int]
    guessed: list[int]
    length: int
    reference: int


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _bleu_counts(caption: str, references: Sequence[str]) -> _Counts:
    words = caption.split()
    most: Counter[Ngram] = Counter()
    lengths = []
    for ref in references:
        tokens = ref.split()
        lengths.append(len(tokens))
        most |= _ngrams(tokens)
    correct = [0] * LONGEST
    for ngram, count in _ngrams(words).items():
        correct[len(ngram) - 1] += min(most[ngram], count)
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    guessed = [max(0, len(words) - n) for n in range(LONGEST)]
    return _Counts(correct, guessed, len(words), closest)


def _bleu(counts: _Counts) -> list[float]:
    product, scores = 1.0, []
    ratio = (counts.length + _TINY) / (counts.reference + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(LONGEST):
        product *= (counts.correct[n] + _TINY) / (counts.guessed[n] + _SMALL)
        scores.append(product ** (1.0 / (n + 1)) * penalty)
    return scores


def _rouge_l(caption: str, references: Sequence[str]) -> float:
    # split(" ") and not split(): an empty caption has one empty word
    words = caption.split(" ")
    precision = recall = 0.0
    for ref in references:
        tokens = ref.split(" ")
        common = _longest_common(tokens, words)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(tokens))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, start=1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


class _Vector:
    """The tf-idf weights of one text by n, their norms, and its number of bigrams."""

    def __init__(self, counts: Mapping[Ngram, int], idf: Mapping[Ngram, float], unseen: float):
        self.weights: list[dict[Ngram, float]] = [defaultdict(float) for _ in range(LONGEST)]
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
        self.norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in self.weights]
        self.bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(hypothesis: _Vector, ref: _Vector) -> float:
    difference = hypothesis.bigrams - ref.bigrams
    penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
    total = 0.0
    for n in range(LONGEST):
        theirs = ref.weights[n]
        shared = [(weight, theirs[ngram]) for ngram, weight in hypothesis.weights[n].items() if ngram in theirs]
        cosine = sum(min(mine, their) * their for mine, their in shared)
        if hypothesis.norms[n] and ref.norms[n]:
            cosine /= hypothesis.norms[n] * ref.norms[n]
        total += cosine * penalty
    return total / LONGEST
