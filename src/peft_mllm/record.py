"""What flows from data to answer: a `Record` is one conversation with its images, as the user wrote it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_MARK = "<image>"
"""Stands in a turn's text where an image goes; the n-th mark of a record is its n-th image."""

Role = Literal["system", "user", "assistant"]


class ImageSource(ABC):
    """An image that is opened only when it is needed."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Equal keys mean equal pixels: samples with equal keys can share the image's prefix."""

    @abstractmethod
    def load(self) -> Image:
        """Return the image as a person sees it: RGB, upright, fully decoded."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of what `load` returns; a source that knows them without decoding says so."""
        return self.load().size


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more images.

    Attributes:
        id: unique within its data set; randomness of a sample is derived from it.
        turns: user and assistant in alternation (a system turn may come first). For training and scoring
            the last turn is the assistant's: the answer to learn, or the reference to be scored against.
        images: in the order of the `<image>` marks in the turns.
        meta: what a metric needs beside the answer, e.g. `choices`, `answer_index`, `subject`.
        source: where it was read, for messages: `train.jsonl:12`.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    source: str = ""

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the final answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """The final assistant turn's text."""
        return self.turns[-1].text
