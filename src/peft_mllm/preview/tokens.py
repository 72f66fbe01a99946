"""A sample token by token, as a person reads it: text, what is learned, and images as one piece each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.models.base import Family

REPLACED = "\ufffd"
"""What a tokenizer writes for half of a character."""

_LONGEST = 6  # tokens of one character: four bytes, and what a byte-level vocabulary may put around them


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        text: what it adds to the text; of a character in several tokens, the first has all of it.
        learned: whether it has a label.
        special: whether it is a control token.
        about: index, id, spelling and position, for who asks.
        breaks: whether the text goes on in a new line.
    """

    text: str
    learned: bool
    special: bool
    about: str
    breaks: bool


@dataclass(frozen=True)
class Span:
    """Consecutive tokens that stand for an image.

    Attributes:
        count: how many.
        first, last: their places in the sample, from 0.
        positions: what the model is told of their places.
    """

    count: int
    first: int
    last: int
    positions: str


class Reading:
    """How one model's tokens are shown.

    Args:
        family: whose tokenizer and image tokens are meant.
    """

    def __init__(self, family: Family):
        self._tokenizer = family.tokenizer
        self._special = set(self._tokenizer.all_special_ids)
        self._special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._of_images = image_tokens(family)

    def image_count(self, sample: Sample) -> int:
        """How many tokens stand for images."""
        return sum(token in self._of_images for token in sample.ids)

    def show(self, sample: Sample) -> list[Token | Span]:
        """All tokens in order, those of an image as one span."""
        texts = self._texts(sample.ids)
        shown: list[Token | Span] = []
        for of_image, group in groupby(range(len(sample.ids)), key=lambda i: sample.ids[i] in self._of_images):
            numbers = list(group)
            if of_image:
                shown.append(Span(len(numbers), numbers[0], numbers[-1], _range(sample, numbers[0], numbers[-1])))
            else:
                shown += [self._token(sample, i, texts[i]) for i in numbers]
        return shown

    def _token(self, sample: Sample, i: int, text: str) -> Token:
        token = sample.ids[i]
        spelled = self._tokenizer.convert_ids_to_tokens([token])[0]
        return Token(
            text=text.replace("\n", "↵"),
            learned=sample.labels[i] != IGNORED,
            special=token in self._special,
            about=f"token {i}: id {token}, {spelled!r}, position {_position(sample, i)}",
            breaks=text.endswith("\n"),
        )

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; where a character takes several, the first has it and the others a dot."""
        texts = [self._text([token]) for token in ids]
        i = 0
        while i < len(ids):
            width = self._width(ids, i) if REPLACED in texts[i] else 1
            if width > 1:
                texts[i : i + width] = [self._text(ids[i : i + width]), *["·"] * (width - 1)]
            i += width
        return texts

    def _width(self, ids: Sequence[int], i: int) -> int:
        """Tokens that make whole characters together; 1 where no few of them do."""
        for width in range(2, _LONGEST + 1):
            if i + width <= len(ids) and REPLACED not in self._text(ids[i : i + width]):
                return width
        return 1

    def _text(self, ids: Sequence[int]) -> str:
        text = str(self._tokenizer.decode(list(ids)))
        first = self._tokenizer.convert_ids_to_tokens([ids[0]])[0]
        # SentencePiece's mark of a space is dropped where decoding begins
        return f" {text}" if str(first).startswith("▁") and not text.startswith(" ") else text


def image_tokens(family: Family) -> frozenset[int]:
    """The ids that stand for an image's features."""
    processor = getattr(family, "processor", None)
    given: list[Any] = [
        getattr(family.model.config, "image_token_id", None),
        getattr(processor, "image_token_id", None),
        getattr(family.tokenizer, "image_pad_id", None),
        *(getattr(processor, "image_token_ids", None) or ()),
    ]
    return frozenset(each for each in given if isinstance(each, int))


def _position(sample: Sample, i: int) -> str:
    return str(i) if sample.positions is None else " / ".join(str(axis[i]) for axis in sample.positions)


def _range(sample: Sample, first: int, last: int) -> str:
    if sample.positions is None:
        return f"{first} to {last}"
    axes = [axis[first : last + 1] for axis in sample.positions]
    return ", ".join(f"{min(axis)} to {max(axis)}" for axis in axes)
