"""From rendered conversation to token ids and labels.

A family renders a record as pieces: text that is or is not to be learned, and images. Text between two images
is tokenised in one go, and what is supervised is found by character offsets, never by counting tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft_mllm.record import ImageSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned (torch's cross-entropy ignores it)."""


@dataclass(frozen=True)
class Text:
    """A stretch of rendered conversation."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class ImagePlace:
    """Where an image's features go: `length` placeholder tokens."""

    length: int


@dataclass(frozen=True)
class Sample:
    """A record as a model reads it.

    Attributes:
        id: the record's id.
        ids: token ids, image placeholders included.
        labels: as long as ids: the id where a token is learned, else -100. Not shifted.
        images: in the order of their placeholders.
        image_end: index after the last image placeholder; 0 without images.
        positions: P rows as long as ids, for a model whose positions have several axes; None counts from 0.
        extras: further arguments of the model's forward, one number a token, by name.
    """

    id: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[ImageSource, ...] = ()
    image_end: int = 0
    positions: tuple[tuple[int, ...], ...] | None = None
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


def encode_pieces(
    pieces: Sequence[Text | ImagePlace],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token_id: int,
    id: str,
    images: tuple[ImageSource, ...],
) -> Sample:
    """Tokenise chunk by chunk around the images, as the original LLaVA does.

    Each chunk is tokenised with the beginning-of-sequence token, which is kept on the first chunk only; so a
    SentencePiece tokenizer begins each chunk with its space mark, as it did in training.
    """
    ids: list[int] = []
    labels: list[int] = []
    image_end = 0
    for first, chunk in _chunks(pieces):
        if isinstance(chunk, ImagePlace):
            ids += [image_token_id] * chunk.length
            labels += [IGNORED] * chunk.length
            image_end = len(ids)
            continue
        chunk_ids, supervised = _tokenise(chunk, tokenizer)
        if not first and chunk_ids and chunk_ids[0] == tokenizer.bos_token_id:
            chunk_ids, supervised = chunk_ids[1:], supervised[1:]
        ids += chunk_ids
        labels += [token if learn else IGNORED for token, learn in zip(chunk_ids, supervised, strict=True)]
    return Sample(id=id, ids=tuple(ids), labels=tuple(labels), images=images, image_end=image_end)


def _chunks(pieces: Sequence[Text | ImagePlace]) -> Iterator[tuple[bool, list[Text] | ImagePlace]]:
    """Whether it is the first, and: the texts between two images, or an image."""
    texts: list[Text] = []
    first = True
    for piece in pieces:
        if isinstance(piece, Text):
            texts.append(piece)
            continue
        if texts or first:
            yield first, texts
        yield False, piece
        texts, first = [], False
    if texts:
        yield first, texts


def _tokenise(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of the joined texts, and for each whether it touches supervised text."""
    spans: list[tuple[int, int]] = []
    joined = ""
    for piece in texts:
        if piece.supervised:
            spans.append((len(joined), len(joined) + len(piece.text)))
        joined += piece.text
    encoded = tokenizer(joined, return_offsets_mapping=True)
    supervised: list[bool] = []
    last = (0, 0)
    for span in encoded["offset_mapping"]:
        start, end = span
        # a mark that the normaliser puts in has the place of the character before it; bytes of one character share one
        if start < last[1] and span != last:
            start = last[1]
        supervised.append(any(start < to and end > begin for begin, to in spans))
        last = span
    return list(encoded["input_ids"]), supervised
