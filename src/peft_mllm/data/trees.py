"""Trees and batches: one image prefix with the question-answer branches that share it, as rows of tensors.

    prefix   [system ... USER: image image ... ]        computed once
    branches [question 1 ASSISTANT: answer 1] [question 2 ASSISTANT: answer 2] ...

A packed batch is one row of all its trees (`pack`); where a model's attention takes none, each row is one tree with a
mask (`collate`). Branches restart their positions at the prefix's end and do not see each other, so losses and
gradients equal those of the samples one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from peft_mllm.attention import PADDING, PREFIX, Packing, tree_mask
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.seeing import Pixels, arguments_of
from peft_mllm.record import ImageSource

NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Four dimensions, so that transformers makes no mask of its own; nothing reads it where the packing says all."""


@dataclass(frozen=True)
class Tree:
    """Samples that share their first `shared` tokens, and the images in them."""

    samples: tuple[Sample, ...]
    shared: int

    @property
    def branched(self) -> bool:
        """Whether there is anything that is shared."""
        return self.shared > 0 and len(self.samples) > 1

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
        attention_mask: (R, 1, T, T) bool, or (R, T) of ones and zeros for a padded batch; no matter where packed.
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
        packing: where the trees of a packed row lie; R is 1.
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
    packing: Packing | None = None

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


def cut(tree: Tree, tokens: int) -> Iterator[Tree]:
    """The tree in parts of at most so many tokens, each with the prefix; a part has at least one sample."""
    some: list[Sample] = []
    length = tree.shared
    for sample in tree.samples:
        own = len(sample.ids) - tree.shared
        if some and length + own > tokens:
            yield replace(tree, samples=tuple(some))
            some, length = [], tree.shared
        some.append(sample)
        length += own
    yield replace(tree, samples=tuple(some))


def _shared(group: Sequence[Sample]) -> int:
    """Length of the common prefix, short of any sample's first learned token."""
    limit = min(_question_length(sample) for sample in group)
    columns = zip(*(sample.ids[:limit] for sample in group), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _question_length(sample: Sample) -> int:
    """Tokens before the first learned one."""
    return next((i for i, label in enumerate(sample.labels) if label != IGNORED), len(sample.ids) - 1)


@dataclass(frozen=True)
class _Piece:
    """Tokens `start` to the sample's `stop` at a place of a batch, for the segment that they make there."""

    sample: Sample
    start: int
    stop: int
    row: int
    column: int
    segment: int = PREFIX


def collate(trees: Sequence[Tree], *, pixels: Pixels, pad_id: int) -> Batch:
    """Lay trees out as rows with a mask, right-padded to the longest.

    Args:
        trees: one row each.
        pixels: the family's image preparation.
        pad_id: token id under padding.
    """
    pieces: list[list[_Piece]] = []
    for row, tree in enumerate(trees):
        prefix, end = _Piece(tree.samples[0], 0, tree.shared, row, 0), tree.shared
        for branch, sample in enumerate(tree.samples):
            own = _Piece(sample, tree.shared, len(sample.ids), row, end, branch)
            pieces.append([prefix, own])
            end += own.stop - own.start
    shape = len(trees), max(tree.length for tree in trees)
    batch, segments = _laid_out(pieces, shape, [tree.images for tree in trees], pixels, pad_id)
    return replace(batch, attention_mask=tree_mask(segments))


def pack(trees: Sequence[Tree], *, pixels: Pixels, pad_id: int) -> Batch:
    """Lay trees out in one row without padding: all prefixes, then all branches (attention.packing).

    A sample alone is a prefix without branches.
    """
    branched = [tree for tree in trees if tree.branched]
    alone = [sample for tree in trees if not tree.branched for sample in tree.samples]
    prefixes = [(tree.samples[0], tree.shared) for tree in branched] + [(sample, len(sample.ids)) for sample in alone]
    column, begun = 0, []
    for sample, length in prefixes:
        begun.append(_Piece(sample, 0, length, 0, column))
        column += length
    pieces: list[list[_Piece]] = []
    for tree, prefix in zip(branched, begun, strict=False):
        for sample in tree.samples:
            own = _Piece(sample, tree.shared, len(sample.ids), 0, column, len(pieces))
            pieces.append([prefix, own])
            column += own.stop - own.start
    pieces += [[piece] for piece in begun[len(branched) :]]
    # each tree's by themselves: what becomes of an image may depend on those that stand with it
    images = [sample.images for sample, _ in prefixes]
    batch, _ = _laid_out(pieces, (1, column), images, pixels, pad_id)
    own_lengths = [[len(sample.ids) - tree.shared for sample in tree.samples] for tree in branched]
    packing = Packing(tuple(length for _, length in prefixes), tuple(map(tuple, own_lengths)))
    return replace(batch, packing=packing)


def _laid_out(
    pieces: Sequence[Sequence[_Piece]],
    shape: tuple[int, int],
    images: Sequence[Sequence[ImageSource]],
    pixels: Pixels,
    pad_id: int,
) -> tuple[Batch, Tensor]:
    """The batch of samples that each lie as one or two pieces, not yet masked; and each token's segment (R, T).

    Args:
        pieces: of each sample, in the order of its tokens; one that samples share is the same object.
        shape: rows and columns.
        images: of each row.
        pixels: the family's image preparation.
        pad_id: token id where no piece lies.
    """
    samples = [own[-1].sample for own in pieces]
    input_ids = torch.full(shape, pad_id)
    segments = torch.full(shape, PADDING)
    axes = max(len(sample.positions or (0,)) for sample in samples)
    position_ids = torch.zeros(axes, *shape, dtype=torch.long)
    extras = _blank(samples, shape)
    for piece in {id(piece): piece for own in pieces for piece in own}.values():
        place = piece.row, slice(piece.column, piece.column + piece.stop - piece.start)
        tokens = slice(piece.start, piece.stop)
        input_ids[place] = torch.tensor(piece.sample.ids[tokens])
        segments[place] = piece.segment
        position_ids[:, *place] = positions_of(piece.sample)[:, tokens]
        for name, values in piece.sample.extras.items():
            extras[name][place] = torch.tensor(values[tokens])
    rows, columns, targets, owners = _answers(pieces)
    batch = Batch(
        input_ids=input_ids,
        attention_mask=NO_MASK,
        position_ids=position_ids if axes > 1 else position_ids[0],
        rows=rows,
        columns=columns,
        targets=targets,
        owners=owners,
        pixels=arguments_of(images, pixels, input_ids),
        extras=extras,
        sample_ids=tuple(sample.id for sample in samples),
        tokens=int((segments != PADDING).sum()),
        sequence_tokens=sum(len(sample.ids) for sample in samples),
        images=sum(len(sample.images) for sample in samples),
    )
    return batch, segments


def _answers(pieces: Sequence[Sequence[_Piece]]) -> Sequence[Tensor]:
    """(A,) each: row and column where each answer token is predicted, the token, and its sample's index."""
    answers: list[tuple[int, int, int, int]] = []
    for owner, own in enumerate(pieces):
        for i, label in enumerate(own[-1].sample.labels):
            if label != IGNORED:
                # a branch's first token is predicted by the prefix's last
                piece = next(piece for piece in own if i - 1 < piece.stop)
                answers.append((piece.row, piece.column + i - 1 - piece.start, label, owner))
    return torch.tensor(answers, dtype=torch.long).reshape(-1, 4).unbind(1)


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
        pixels=arguments_of([sample.images for sample in samples], pixels, input_ids),
        extras=extras,
        sample_ids=tuple(sample.id for sample in samples),
        tokens=int(attention_mask.sum()),
        sequence_tokens=sum(len(sample.ids) for sample in samples),
        images=sum(len(sample.images) for sample in samples),
    )


def positions_of(sample: Sample) -> Tensor:
    """(P, n) the sample's positions; one axis that counts from 0 where it has none of its own."""
    return torch.arange(len(sample.ids))[None] if sample.positions is None else torch.tensor(sample.positions)


def _blank(samples: Sequence[Sample], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Zeros for each extra argument that any sample has."""
    return {name: torch.zeros(shape, dtype=torch.long) for sample in samples for name in sample.extras}
