"""What a data set's owners publish, as data: files, splits, licence, and how its questions are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from pydantic import BaseModel

SplitName = Literal["train", "validation", "test"]
Seen = Literal["seen", "unseen", "unknown"]


@dataclass(frozen=True)
class Item:
    """One question of a split, before its image is brought.

    Attributes:
        id: unique within the split.
        entry: what the release says of it, checked.
        image: its image's name below the split's folder; None where it has none.
        find: the ends of the paths at which the release may hold the image, the likeliest first.
        row: the row of a table that holds the image's bytes, where the release is one.
    """

    id: str
    entry: BaseModel
    image: str | None = None
    find: tuple[str, ...] = ()
    row: int | None = None


class Files(Protocol):
    """A release's files, wherever they lie: unpacked or in archives."""

    def read(self, *ends: str) -> Document:
        """The JSON of the file whose path ends so; of several ends, the first that is there."""

    def has(self, *ends: str) -> bool:
        """Whether there is such a file."""

    def holds(self, end: str) -> bool:
        """Whether an image lies at a path that ends so."""


@dataclass(frozen=True)
class Document:
    """A parsed file, and what to call it in messages."""

    place: str
    value: Any


@dataclass(frozen=True)
class Part:
    """One split of a release.

    Attributes:
        official: its name in the release, which its folder takes too.
        questions: how many it has; None where its owners do not say.
        also: other numbers that are right, of other versions of the release.
        unit: what is counted.
        note: what a reader of scores must know about it.
    """

    official: str
    questions: int | None
    also: tuple[int, ...] = ()
    unit: str = "questions"
    note: str = ""


@dataclass(frozen=True)
class Download:
    """One file to get.

    Attributes:
        file: its name.
        url: where it is published.
        md5: of its content, where that is known.
    """

    file: str
    url: str
    md5: str | None = None


@dataclass(frozen=True)
class Hub:
    """Where and how a hub has the data set, for the `datasets` library.

    Attributes:
        path: its name there.
        splits: official split -> the hub's split; a split that is not among them is not there.
        columns: those that `read` cannot do without, beside the images.
        read: items of the rows of an official split; their `row` says which row has the image. A row has the
            table's columns without the image, and `has_image`.
        config: its configuration.
        revision: of the repository.
        image: the column of images.
    """

    path: str
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    read: Callable[[Sequence[Mapping[str, Any]], str], list[Item]]
    config: str | None = None
    revision: str | None = None
    image: str = "image"


@dataclass(frozen=True)
class Release:
    """A data set.

    Attributes:
        title: its name as people write it.
        paper: the source to cite.
        home: its page.
        licence: of questions and images, as its owners state it.
        size: of the files to get, in words.
        folder: of the prepared data, below `datasets`.
        splits: ours -> the release's; the one that is scored is `test`.
        downloads: the files.
        read: the items of an official split.
        seen: model -> whether its training had this data.
        hub: the data set on a hub, where it is.
        samples: sizes of random samples of the splits that the study uses; recorded when it is prepared.
        count: how many of a part's units there are in its items; each is one if left out.
    """

    title: str
    paper: str
    home: str
    licence: str
    size: str
    folder: str
    splits: Mapping[SplitName, Part]
    downloads: tuple[Download, ...]
    read: Callable[[Files, str], list[Item]]
    seen: Mapping[str, Seen]
    hub: Hub | None = None
    samples: Mapping[SplitName, tuple[int, ...]] = field(
        default_factory=lambda: MappingProxyType({"train": (1000, 5000, 10000)})
    )
    count: Callable[[Sequence[Item]], int] = len

    def where(self) -> str:
        """What to get, in one sentence."""
        return f"Get {', '.join(each.file for each in self.downloads)} from {self.home}."
