"""What tasks with a prepared folder share: their options, their reading, and drawing a sample of a split."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from peft_mllm.data.prepare.release import Release
from peft_mllm.data.prepare.writing import RULE, sample
from peft_mllm.data.prepared import Line, PreparedRecords, open_prepared, read_manifest
from peft_mllm.errors import DataError
from peft_mllm.files import file_digest
from peft_mllm.record import Record
from peft_mllm.tasks.base import Split, Task, TaskOptions


class SampledOptions(TaskOptions):
    """Where the data is, and how much of it is used."""

    root: Path
    """Folder that `peft-mllm data prepare` made."""
    train_size: int | None = Field(default=None, ge=1)
    """Train on this many questions, drawn at random; all if left out, or if there are fewer."""
    test_size: int | None = Field(default=None, ge=1)
    """Score this many questions, drawn at random; all if left out, or if there are fewer."""
    sample_seed: int = Field(default=42, ge=0)
    """Of the draw: equal seeds and sizes give equal questions, and a smaller sample is part of a larger."""
    train_ids: Path | None = None
    """Train on the questions whose ids this JSON file lists, instead of drawing; such as samples/*.json."""


class PreparedOptions(SampledOptions):
    """Those of a task that is read from a prepared folder alone; it says which prompts there are."""

    prompt: str
    """Whose words ask the question: a key of the task's `prompts`."""


class PreparedTask(Task):
    """A task that is read from the folder that `peft-mllm data prepare` makes of its release.

    A task that derives from it gives `name`, `Options` with the values of `prompt`, `metric`, `prompts`, `release`
    and `record_of`.
    """

    name: ClassVar[str]
    """On the shelf; the folder was prepared under it."""
    release: ClassVar[Release]

    def __init__(self, options: TaskOptions):
        assert isinstance(options, self.Options)
        assert isinstance(options, PreparedOptions)
        self.options = options
        self._prompt = self.prompts[options.prompt]
        self.max_new_tokens = self._prompt.max_new_tokens  # type: ignore[misc]

    def has(self, split: Split) -> bool:
        """Whether the release has this split with answers."""
        return split in self.release.splits

    def records(self, split: Split) -> Sequence[Record]:
        """What the split asks, or what of it is drawn, in the order of the release."""
        return open_split(self.name, self.release, self.options, split, self.record_of)

    @abstractmethod
    def record_of(self, line: Line) -> Record:
        """The record of one line, as the prompt asks it."""

    def origin(self, split: Split) -> dict[str, Any]:
        """Its folder's manifest, and the draw."""
        return origin(self.name, self.release, self.options, split)


class Drawn(NamedTuple):
    """Which records of a split are used: their places, of how many, and how they were chosen."""

    places: tuple[int, ...]
    of: int
    told: Mapping[str, Any]


def open_split(
    task: str,
    release: Release,
    options: SampledOptions,
    split: Split,
    make: Callable[[Line], Record],
    *,
    images_only: bool = False,
) -> Sequence[Record]:
    """The records of a split of a prepared folder.

    Args:
        task: its name on the shelf.
        release: the data set.
        options: where the folder is, and how much of it to use.
        split: ours.
        make: a record from a line.
        images_only: leave out the questions without an image.

    Raises:
        DataError: the folder is not what was prepared, or has no such split.
    """
    records = open_prepared(options.root, task, official_name(task, release, split), make)
    drawn = _drawn_of(options, split, records, images_only)
    if drawn is None:
        return records.with_images() if images_only else records
    return records.only(drawn.places)


def official_name(task: str, release: Release, split: Split) -> str:
    """The release's name of a split.

    Raises:
        DataError: it has none.
    """
    if split not in release.splits:
        raise DataError(f"{task}: there is no {split} split, only {', '.join(release.splits)}.")
    return release.splits[split].official


def origin(
    task: str, release: Release, options: SampledOptions, split: Split, *, images_only: bool = False
) -> dict[str, Any]:
    """What a result says of a split: how whole it is, and which questions were drawn."""
    manifest = read_manifest(options.root, task)
    official = official_name(task, release, split)
    account = manifest["splits"][official]
    told = {
        "official_split": official,
        "partial": manifest["partial"],
        **{key: account[key] for key in ("questions", "published", "left_out")},
        "manifest_sha256": file_digest(options.root / "prepared.json"),
    }
    records = PreparedRecords(options.root, official, _no_record)
    drawn = _drawn_of(options, split, records, images_only)
    return told if drawn is None else {**told, "sample": dict(drawn.told)}


def choose(ids: Sequence[str], options: SampledOptions, split: Split) -> Drawn | None:
    """Which of a split's questions are used; None is all.

    Raises:
        DataError: the file of ids cannot be read, or names questions that are not there.
    """
    if split == "train" and options.train_ids is not None:
        return _listed(ids, options.train_ids)
    size = _size(options, split)
    if size is None or size >= len(ids):
        return None
    places = sample(ids, size, seed=options.sample_seed, split=split)
    return _told(ids, places, {"size": size, "seed": options.sample_seed, "rule": RULE})


def _size(options: SampledOptions, split: Split) -> int | None:
    return {"train": options.train_size, "test": options.test_size}.get(split)


def _drawn_of(options: SampledOptions, split: Split, records: PreparedRecords, images_only: bool) -> Drawn | None:
    size = _size(options, split)
    listed = split == "train" and options.train_ids is not None
    if not listed and (size is None or size >= len(records)):
        return None
    status = records.path.stat()
    return _drawn(options, split, str(records.path), images_only, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _drawn(
    options: SampledOptions, split: Split, path: str, images_only: bool, size: int, mtime_ns: int
) -> Drawn | None:
    """Half a million questions take seconds to draw from, and a run asks more than once."""
    file = Path(path)
    records = PreparedRecords(file.parent, file.stem, _no_record)
    kept = records.with_images() if images_only else records
    drawn = choose(kept.ids(), options, split)
    return drawn and drawn._replace(places=tuple(kept.numbers[place] for place in drawn.places))


def _no_record(line: Line) -> Record:
    raise AssertionError("only ids are read")


def _listed(ids: Sequence[str], file: Path) -> Drawn:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: is no readable JSON ({error}). Give a list of ids, or a file of samples/.") from None
    wanted = value.get("ids") if isinstance(value, dict) else value
    if not isinstance(wanted, list) or not wanted:
        raise DataError(f"{file}: holds no list of ids. Give a list of ids, or a file of samples/.")
    place_of = {each: place for place, each in enumerate(ids)}
    unknown = [str(each) for each in wanted if str(each) not in place_of]
    if unknown:
        raise DataError(f"{file}: {len(unknown)} of {len(wanted)} ids are not there: {', '.join(unknown[:5])}.")
    places = sorted({place_of[str(each)] for each in wanted})
    return _told(ids, places, {"size": len(places), "file": file.name})


def _told(ids: Sequence[str], places: Sequence[int], told: Mapping[str, Any]) -> Drawn:
    digest = hashlib.sha256("\n".join(ids[place] for place in places).encode()).hexdigest()
    return Drawn(tuple(places), len(ids), {"of": len(ids), **told, "ids_sha256": digest})
