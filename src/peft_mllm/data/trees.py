"""Trees and batches: one image prefix with the question-answer branches that share it, as rows of tensors.

    prefix   [system ... USER: image image ... ]        computed once
    branches [question 1 ASSISTANT: answer 1] [question 2 ASSISTANT: answer 2] ...

Each row of a batch is one tree. Branches restart their positions at the prefix's end and do not see each other
(attention.tree_mask), so losses and gradients equal those of the samples one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from peft_mllm.attention import PADDING, PREFIX, tree_mask
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.record import ImageSource

Pixels = Callable[[Sequence[Sequence[Image]], Tensor], dict[str, Tensor]]
"""A family's `pixels`: each row's images, and the rows' ids, to keyword arguments of the model's forward."""


@dataclass(frozen=True)
class Tree:
    """Samples that share their first `shared` tokens, and the images in them."""

    samples: tuple[Sample, ...]
    shared: int

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The prefix's images; a tree of one sample has that sample's."""
        return self.samples[0].images

    @property
    def length(self) -> int:
        """Tokens of its row."""
        return self.shared + sum(len(sample.ids) - self.shared for sample in self.samples)


@dataclass(frozen=True)
class Batch:
    """Rows of tensors with what is to be learned from them.

    Attributes:
        input_ids: (R, T).
        attention_mask: (R, 1, T, T) bool, or (R, T) of ones and zeros for a padded batch.
        position_ids: (R, T), or (P, R, T) for several axes, or None to let the model count.
        rows, columns: (A,) where the prediction of each answer token is read: the hidden state before it.
        targets: (A,) the answer tokens.
        owners: (A,) index into `sample_ids` of each answer token.
        pixels: keyword arguments of the model's forward for the images; empty without images.
        extras: (R, T) each: further arguments of the forward, one number a token.
        sample_ids: the samples, for messages.
        tokens: tokens computed, padding left out.
        sequence_tokens: tokens of the samples, each counted whole: what nothing shared would compute.
        images: images of the samples, likewise.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    rows: Tensor
    columns: Tensor
    targets: Tensor
    owners: Tensor
    pixels: dict[str, Tensor]
    extras: dict[str, Tensor]
    sample_ids: tuple[str, ...]
    tokens: int
    sequence_tokens: int
    images: int

    @property
    def answer_tokens(self) -> int:
        """A, the number of tokens learned."""
        return self.targets.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        for group in ("pixels", "extras"):
            moved[group] = {name: value.to(device, non_blocking=True) for name, value in getattr(self, group).items()}
        return replace(self, **moved)


def plant(samples: Sequence[Sample], *, share: bool) -> list[Tree]:
    """Group samples with the same images into trees, in order of first appearance.

    The prefix is the longest common run of tokens; it must cover the images and must not reach into any answer,
    else the sample stays alone.
    """
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for i, sample in enumerate(samples):
        key = tuple(image.key for image in sample.images) if share and sample.images else (i,)
        # the tokens before the images are part of the key: samples that differ there cannot share them
        groups.setdefault((key, sample.ids[: sample.image_end]), []).append(sample)
    return [tree for group in groups.values() for tree in _tree_or_trees(group)]


def _tree_or_trees(group: Sequence[Sample]) -> list[Tree]:
    """One tree, where the common prefix covers the images; else each sample alone."""
    shared = _shared(group)
    if len(group) == 1 or shared < group[0].image_end:
        return [Tree(samples=(sample,), shared=0) for sample in group]
    return [Tree(samples=tuple(group), shared=shared)]


def _shared(group: Sequence[Sample]) -> int:
    """Length of the common prefix, short of any sample's first learned token."""
    limit = min(_question_length(sample) for sample in group)
    columns = zip(*(sample.ids[:limit] for sample in group), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _question_length(sample: Sample) -> int:
    """Tokens before the first learned one."""
    return next((i for i, label in enumerate(sample.labels) if label != IGNORED), len(sample.ids) - 1)


def collate(trees: Sequence[Tree], *, pixels: Pixels, pad_id: int) -> Batch:
    """Lay trees out as rows, right-padded to the longest.

    Args:
        trees: one row each.
        pixels: the family's image preparation.
        pad_id: token id under padding.
    """
    length = max(tree.length for tree in trees)
    input_ids = torch.full((len(trees), length), pad_id)
    segments = torch.full((len(trees), length), PADDING)
    axes = max(len(sample.positions or (0,)) for tree in trees for sample in tree.samples)
    position_ids = torch.zeros(axes, len(trees), length, dtype=torch.long)
    extras = _blank([sample for tree in trees for sample in tree.samples], (len(trees), length))
    answers: list[tuple[int, int, int, int]] = []  # row, column, target, owner
    sample_ids: list[str] = []
    for row, tree in enumerate(trees):
        shared = tree.shared
        input_ids[row, :shared] = torch.tensor(tree.samples[0].ids[:shared])
        segments[row, :shared] = PREFIX
        position_ids[:, row, :shared] = _positions(tree.samples[0])[:, :shared]
        for name, values in tree.samples[0].extras.items():
            extras[name][row, :shared] = torch.tensor(values[:shared])
        start = shared
        for branch, sample in enumerate(tree.samples):
            end = start + len(sample.ids) - shared
            input_ids[row, start:end] = torch.tensor(sample.ids[shared:])
            segments[row, start:end] = branch
            position_ids[:, row, start:end] = _positions(sample)[:, shared:]
            for name, values in sample.extras.items():
                extras[name][row, start:end] = torch.tensor(values[shared:])
            for i, label in enumerate(sample.labels):
                if label != IGNORED:
                    # a branch's first token is predicted by the prefix's last
                    column = i - 1 if i - 1 < shared else start + i - 1 - shared
                    answers.append((row, column, label, len(sample_ids)))
            sample_ids.append(sample.id)
            start = end
    rows, columns, targets, owners = torch.tensor(answers).reshape(-1, 4).unbind(1)
    return Batch(
        input_ids=input_ids,
        attention_mask=tree_mask(segments),
        position_ids=position_ids if axes > 1 else position_ids[0],
        rows=rows,
        columns=columns,
        targets=targets,
        owners=owners,
        pixels=_images([tree.images for tree in trees], pixels, input_ids),
        extras=extras,
        sample_ids=tuple(sample_ids),
        tokens=sum(tree.length for tree in trees),
        sequence_tokens=sum(len(sample.ids) for tree in trees for sample in tree.samples),
        images=sum(len(sample.images) for tree in trees for sample in tree.samples),
    )


def collate_padded(samples: Sequence[Sample], *, pixels: Pixels, pad_id: int, left: bool = False) -> Batch:
    """Lay samples out one per row with a two-dimensional mask: the plain computation, nothing shared.

    Generation reads its prompts so (`left`); peft's own prompt methods train so, because they widen this mask.
    """
    length = max(len(sample.ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
    extras = _blank(samples, (len(samples), length))
    answers: list[tuple[int, int, int, int]] = []
    for row, sample in enumerate(samples):
        offset = length - len(sample.ids) if left else 0
        input_ids[row, offset : offset + len(sample.ids)] = torch.tensor(sample.ids)
        attention_mask[row, offset : offset + len(sample.ids)] = 1
        for name, values in sample.extras.items():
            extras[name][row, offset : offset + len(values)] = torch.tensor(values)
        answers += [(row, offset + i - 1, label, row) for i, label in enumerate(sample.labels) if label != IGNORED]
    rows, columns, targets, owners = torch.tensor(answers, dtype=torch.long).reshape(-1, 4).unbind(1)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=None,
        rows=rows,
        columns=columns,
        targets=targets,
        owners=owners,
        pixels=_images([sample.images for sample in samples], pixels, input_ids),
        extras=extras,
        sample_ids=tuple(sample.id for sample in samples),
        tokens=int(attention_mask.sum()),
        sequence_tokens=sum(len(sample.ids) for sample in samples),
        images=sum(len(sample.images) for sample in samples),
    )


def _positions(sample: Sample) -> Tensor:
    """(P, n) the sample's positions; one axis that counts from 0 where it has none of its own."""
    return torch.arange(len(sample.ids))[None] if sample.positions is None else torch.tensor(sample.positions)


def _blank(samples: Sequence[Sample], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Zeros for each extra argument that any sample has."""
    return {name: torch.zeros(shape, dtype=torch.long) for sample in samples for name in sample.extras}


def _images(rows: Sequence[Sequence[ImageSource]], pixels: Pixels, input_ids: Tensor) -> dict[str, Tensor]:
    """The images of a batch's rows in the order of their placeholders; none is no argument at all."""
    return pixels([[source.load() for source in row] for row in rows], input_ids) if any(rows) else {}
