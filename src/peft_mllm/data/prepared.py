"""A prepared folder, as `peft-mllm data prepare` leaves it, and its records read one by one.

    prepared.json                what it is, from which files, how many questions; sealed with its own sha256
    train.jsonl                  {"id", "image", "entry"}: a question as its release has it, and its image's path
    train/...                    the images
    images_train.jsonl           {"name", "bytes", "sha256"} of each image
    llava_train.json             the same questions as conversations, with one prompt, for other programs;
    qwen_train.json              image paths are relative to the folder
    samples/train_1000_seed42.json    ids of random samples

A folder without prepared.json is not finished. A split's name is the release's: `val` may be what we score.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from peft_mllm.data.images import FileImage
from peft_mllm.data.prepare.images import seals
from peft_mllm.errors import DataError
from peft_mllm.files import file_digest, read_sealed
from peft_mllm.record import Record

MANIFEST = "prepared.json"
SCHEMA = 1


@dataclass(frozen=True)
class Line:
    """One question of a prepared split.

    Attributes:
        id: unique in the split.
        split: the release's name of it.
        image: None where there is none.
        entry: what the release says.
        source: file and line, for messages.
    """

    id: str
    split: str
    image: FileImage | None
    entry: Mapping[str, Any]
    source: str


class PreparedRecords(Sequence[Record]):
    """The records of a prepared split, made when they are asked for; safe in forked and spawned workers."""

    def __init__(self, folder: Path, official: str, make: Callable[[Line], Record]):
        self.folder, self.official = folder, official
        self.path = folder / f"{official}.jsonl"
        self._make = make
        self._seals = seals(folder, official)
        self._starts = _line_starts(self.path)
        self.numbers: Sequence[int] = range(len(self._starts) - 1)
        """Of the lines, from 0, in the order of the records."""
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return self.only(self.numbers[index])
        return self._make(self.line(self.numbers[index]))

    def only(self, numbers: Iterable[int]) -> PreparedRecords:
        """Some of them, by their numbers in the file."""
        chosen = object.__new__(PreparedRecords)
        chosen.__dict__ = self.__getstate__() | {"numbers": array("L", numbers)}
        return chosen

    def with_images(self) -> PreparedRecords:
        """Those that have an image."""
        return self.only([number for number in self.numbers if self._value(number)["image"] is not None])

    def ids(self) -> list[str]:
        """The id of each."""
        return [self._value(number)["id"] for number in self.numbers]

    def line(self, number: int) -> Line:
        """A line of the file, from 0."""
        value = self._value(number)
        name = value["image"]
        image = None
        if name is not None:
            inner = name.removeprefix(f"{self.official}/")
            image = FileImage(f"{self.folder}/{name}", name=name, seal=self._seals.get(inner))
        return Line(value["id"], self.official, image, value["entry"], f"{self.path.name}:{number + 1}")

    def _value(self, number: int) -> dict[str, Any]:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        start, end = self._starts[number], self._starts[number + 1]
        value: dict[str, Any] = json.loads(os.pread(self._descriptor, end - start, start))
        return value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # just tested


def is_prepared(folder: Path) -> bool:
    """Whether a folder was prepared to its end."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, task: str) -> dict[str, Any]:
    """What a prepared folder says of itself.

    Raises:
        DataError: it is not prepared, not finished, damaged, or another task's.
    """
    again = f"`peft-mllm data prepare {task} --source ...` makes one."
    try:
        manifest = read_sealed(folder / MANIFEST)
    except FileNotFoundError:
        begun = (folder / "preparing.json").is_file()
        what = "is not finished; the same command goes on" if begun else f"is no prepared folder. {again}"
        raise DataError(f"{folder}: has no {MANIFEST}, so it {what}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: {error}. Delete the folder, and prepare it again.") from None
    if manifest.get("task") != task:
        raise DataError(f"{folder}: holds the task '{manifest.get('task')}', not '{task}'. {again}")
    return manifest


def open_prepared(folder: Path, task: str, official: str, make: Callable[[Line], Record]) -> PreparedRecords:
    """The records of a split, its files compared with what was prepared.

    Args:
        folder: the prepared folder.
        task: its name on the shelf.
        official: the release's name of the split.
        make: a record from a line.

    Raises:
        DataError: the split was not prepared, a file is not what it was, or images are gone.
    """
    manifest = read_manifest(folder, task)
    split = manifest["splits"].get(official)
    if split is None:
        there = ", ".join(manifest["splits"]) or "none"
        raise DataError(f"{folder}: the split '{official}' was not prepared, only {there}. Prepare it again with it.")
    for name in (f"{official}.jsonl", f"images_{official}.jsonl"):
        expected = split["files"][name]["sha256"]
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            raise DataError(f"{path}: is gone or changed. The command that prepared {folder} makes it again.")
    records = PreparedRecords(folder, official, make)
    lost = [name for name in records._seals if not (folder / official / name).is_file()]
    if lost:
        listed = ", ".join(lost[:5])
        raise DataError(
            f"{folder / official}: {len(lost)} of {len(records._seals)} images are gone: {listed}. "
            "The command that prepared it brings them back."
        )
    return records


def _line_starts(path: Path) -> array[int]:
    """Where each line begins, and where the last one ends."""
    starts, place = array("Q", [0]), 0
    with path.open("rb") as file:
        for line in file:
            place += len(line)
            starts.append(place)
    return starts
