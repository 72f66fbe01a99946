"""Multiple choice by likelihood: each choice's cross-entropy as the answer, and the lowest wins.

With l_1 .. l_n the cross-entropies of a choice's n tokens after the question (the end mark is not among them):

    likelihood        (l_1 + .. + l_n) / n             Qwen-VL's evaluation (evaluate_multiple_choice.py)
    likelihood_sum     l_1 + .. + l_n                  the probability of the text itself
    likelihood_chars  (l_1 + .. + l_n) / characters    lm-evaluation-harness's acc_norm

The choices are written as the task writes its answers: letters where the reference is a letter, else texts. The
choices of one question share it as the prefix of a tree, so the question and its image are computed once. Where that
costs less, the questions of one image share the image instead, each with each of its choices being a branch. Before a
model's first answers a tree of each kind is held against plain rows, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from string import ascii_uppercase
from types import MappingProxyType

import torch

from peft_mllm.answers import Answer
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.trees import Batch, Tree, collate, collate_padded
from peft_mllm.exactness import same_logits, tried
from peft_mllm.proof import Proof
from peft_mllm.record import Record, Turn
from peft_mllm.tuned import Tuned

PROOF, OF_TEXT = "choices", "choices_of_text"
"""Their names among a model's proofs; the second is of questions without images, until some with images come."""
PROVEN = 4
"""Branches of a tree that are compared, at most."""

RULES: Mapping[str, str] = MappingProxyType(
    {
        "likelihood": "the choice of the lowest mean cross-entropy a token (Qwen-VL's rule)",
        "likelihood_sum": "the choice of the lowest summed cross-entropy",
        "likelihood_chars": "the choice of the lowest cross-entropy a character (acc_norm of lm-evaluation-harness)",
    }
)


def choices_of(record: Record) -> tuple[str, ...]:
    """The answers that may be given, as the task writes them; none where the question is not multiple choice."""
    texts = tuple(str(choice) for choice in record.meta.get("choices", ()))
    index = record.meta.get("answer_index")
    if not isinstance(index, int) or not 0 <= index < len(texts) or len(set(texts)) < len(texts):
        return ()
    if record.answer == texts[index]:
        return texts
    letters = tuple(ascii_uppercase[: len(texts)])
    return letters if len(letters) == len(texts) and record.answer == letters[index] else ()


@torch.no_grad()
def choose(tuned: Tuned, records: Sequence[Record], rule: str, *, rows: int, pad_id: int) -> list[Answer]:
    """Answer multiple-choice questions by likelihood.

    Args:
        tuned: the model.
        records: questions that have choices.
        rule: a name of `RULES`.
        rows: of a batch where the model takes no trees; a tree is one row with all choices of its questions.
        pad_id: token id under padding.
    """
    offered = [choices_of(record) for record in records]
    asked = [_samples(tuned, record, texts) for record, texts in zip(records, offered, strict=True)]
    losses = iter(_losses(tuned, asked, rows=rows, pad_id=pad_id))
    answers = []
    for texts, samples in zip(offered, asked, strict=True):
        sums = [next(losses) for _ in texts]
        lengths = {
            "likelihood": [sample.answer_tokens for sample in samples],
            "likelihood_sum": [1] * len(texts),
            "likelihood_chars": [len(text) for text in texts],
        }[rule]
        each = [total / length for total, length in zip(sums, lengths, strict=True)]
        best = min(range(len(texts)), key=each.__getitem__)
        answers.append(Answer(texts[best], samples[best].answer_tokens, "choice", tuple(each)))
    return answers


def _samples(tuned: Tuned, record: Record, texts: Sequence[str]) -> list[Sample]:
    """The question with each choice as its answer; only the choice's own tokens are scored."""
    family = tuned.family
    answered = [replace(record, turns=(*record.question, Turn("assistant", text))) for text in texts]
    return [_scored(family.encode(each), family.stops) for each in answered]


def _scored(sample: Sample, stops: Sequence[int]) -> Sample:
    """With labels on the last answer alone, without the mark that ends it."""
    end = max(i for i, label in enumerate(sample.labels) if label != IGNORED) + 1
    start = end - sum(1 for _ in takewhile(lambda label: label != IGNORED, reversed(sample.labels[:end])))
    end = next((i for i in range(start + 1, end) if sample.labels[i] in stops), end)
    kept = tuple(label if start <= i < end else IGNORED for i, label in enumerate(sample.labels))
    return replace(sample, labels=kept)


def tree_of(samples: Sequence[Sample]) -> Tree:
    """One question's choices as branches of the question; nothing that is scored is shared."""
    limit = min(next(i for i, label in enumerate(sample.labels) if label != IGNORED) for sample in samples)
    columns = zip(*(sample.ids[:limit] for sample in samples), strict=True)
    return Tree(tuple(samples), sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns)))


def trees_of(asked: Sequence[Sequence[Sample]], width: int) -> list[Tree]:
    """The choices of some questions as the rows that cost least: one for each question, or some for an image.

    Args:
        asked: each question with each of its choices.
        width: of the decoder's hidden states.
    """
    apart = [tree_of(samples) for samples in asked]
    merged: list[Tree] = []
    for group in _by_image(asked):
        each = [tree_of(samples) for samples in group]
        one = tree_of([sample for samples in group for sample in samples])
        merged += [one] if _covers(one) and _cost([one], width) < _cost(each, width) else each
    return min(apart, merged, key=lambda trees: _cost(trees, width))


def _by_image(asked: Sequence[Sequence[Sample]]) -> list[list[Sequence[Sample]]]:
    """Questions that have image and all before it in common; one without an image is by itself."""
    groups: dict[object, list[Sequence[Sample]]] = {}
    for i, samples in enumerate(asked):
        first = samples[0]
        key = tuple(image.key for image in first.images) if first.images else i
        groups.setdefault((key, first.ids[: first.image_end]), []).append(samples)
    return list(groups.values())


def _cost(trees: Sequence[Tree], width: int) -> float:
    """What rows of trees cost, padding included: products by the token, and scores by pairs of tokens.

    A layer has about 24 D^2 operations a token and 4 D a pair. Those of masked scores take four times as long, as
    measured on a CPU; so a row of T tokens costs T (6 D + 4 T).
    """
    length = max(tree.length for tree in trees)
    return len(trees) * length * (6 * width + 4 * length)


def _covers(tree: Tree) -> bool:
    """Whether a tree's images are all in its prefix."""
    return tree.shared >= tree.samples[0].image_end


def _losses(tuned: Tuned, asked: Sequence[Sequence[Sample]], *, rows: int, pad_id: int) -> list[float]:
    """The summed cross-entropy of each choice of each question, in order."""
    pixels, reach = tuned.family.pixels, tuned.family.reach
    alone = [sample for samples in asked for sample in samples]
    near = reach is None or all(len(sample.ids) <= reach for sample in alone)
    fit = tuned.trees and near and all(_covers(tree_of(samples)) for samples in asked)
    if fit and _is_exact(tuned, asked, pad_id):
        trees = trees_of(asked, tuned.decoder.config.get_text_config().hidden_size)
        sums = _sums(tuned, collate(trees, pixels=pixels, pad_id=pad_id))
        planted = [sample for tree in trees for sample in tree.samples]
        found = {id(sample): loss for sample, loss in zip(planted, sums, strict=True)}
        return [found[id(sample)] for sample in alone]
    together = [alone[i : i + rows] for i in range(0, len(alone), rows)]
    batches = (collate_padded(some, pixels=pixels, pad_id=pad_id) for some in together)
    return [loss for batch in batches for loss in _sums(tuned, batch)]


def _is_exact(tuned: Tuned, asked: Sequence[Sequence[Sample]], pad_id: int) -> bool:
    """Whether trees do on this model; before it is known, they are tried."""
    proofs = tuned.proofs
    name = PROOF if PROOF in proofs or any(samples[0].images for samples in asked) else OF_TEXT
    if name not in proofs:
        proofs[name] = tried(lambda: _prove(tuned, asked, pad_id))
    return proofs[name].passed


def _prove(tuned: Tuned, asked: Sequence[Sequence[Sample]], pad_id: int) -> Proof:
    """Hold the choices of a question, and of two about one image where there are such, against plain rows."""
    group = max(_by_image(asked), key=lambda group: (bool(group[0][0].images), len(group)))
    trees = [tree_of(group[0][:PROVEN])]
    several = tree_of([sample for samples in group[:2] for sample in samples[: PROVEN // 2]])
    if len(group) > 1 and _covers(several):
        trees.append(several)
    pixels = tuned.family.pixels
    plain = collate_padded([sample for tree in trees for sample in tree.samples], pixels=pixels, pad_id=pad_id)
    found = tuned.answer_logits(collate(trees, pixels=pixels, pad_id=pad_id).to(tuned.device))
    return same_logits(tuned, found, plain.to(tuned.device))


def _sums(tuned: Tuned, batch: Batch) -> list[float]:
    losses = tuned.answer_losses(batch.to(tuned.device)).double().cpu()
    sums = torch.zeros(len(batch.sample_ids), dtype=torch.float64)
    return sums.index_add_(0, batch.owners.cpu(), losses).tolist()
