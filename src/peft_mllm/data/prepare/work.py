"""The work of `peft-mllm data prepare`: read, bring images, write, verify, seal. What was killed goes on.

Nothing is done twice: images have a journal, files appear whole, and the manifest is written last. Whatever a full
release must have is compared: numbers of questions, checksums where they are known, every image decoded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peft_mllm.data.official import refuse
from peft_mllm.data.prepare.images import GO_ON, Brought, Carrier, journal_of
from peft_mllm.data.prepare.release import Item, Part, Release, SplitName
from peft_mllm.data.prepare.source import MISSING, Source
from peft_mllm.data.prepare.state import STATE, begin, finished
from peft_mllm.data.prepare.tables import Tables
from peft_mllm.data.prepare.writing import SEED, write_llava, write_questions, write_qwen, write_sample
from peft_mllm.data.prepared import MANIFEST, SCHEMA, Line, PreparedRecords, is_prepared
from peft_mllm.errors import DataError, Interrupted, UserError
from peft_mllm.files import atomic_write, disk_errors, file_digest, sealed_json, write_json, write_lines
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.rundir.lock import Lock
from peft_mllm.screen import Screen

LEFT_OUT = "left_out.jsonl"
_KEPT = ("bytes", "sha256", "md5", "rows", "fingerprint")
_PARTIAL = "If it is meant to be a part of the release, say --partial; results then say so."


@dataclass(frozen=True)
class Wish:
    """What is to be prepared.

    Attributes:
        task: its name on the shelf.
        release: the data set.
        folder: where it goes.
        splits: which of ours; they must be the release's.
        limit: only the first questions of each split.
        partial: go on with what is there where questions or images are missing.
        prompt: of the conversations for other programs.
        record: a record with that prompt, from a line.
    """

    task: str
    release: Release
    folder: Path
    splits: tuple[SplitName, ...]
    limit: int | None
    partial: bool
    prompt: str
    record: Callable[[Line], Record]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the outcome, beside the source."""
        chosen = {"splits": list(self.splits), "limit": self.limit, "partial": self.partial, "prompt": self.prompt}
        return {"task": self.task, **chosen}

    @property
    def full(self) -> bool:
        """Whether the whole release is wanted, so that its numbers must be right."""
        return self.limit is None and not self.partial


@dataclass
class Split:
    """A split while it is prepared."""

    name: SplitName
    part: Part
    items: list[Item]
    found: int
    units: int
    left_out: dict[str, str] = field(default_factory=dict)
    brought: Brought = field(default_factory=Brought)


def prepare(wish: Wish, source: Source | Tables, *, screen: Screen, stop: Callable[[], bool]) -> dict[str, Any]:
    """Prepare a data set, from wherever an earlier call stopped.

    Returns:
        the manifest.

    Raises:
        DataError: the release is not what it must be; everything of one kind at once.
        Interrupted: somebody asked to stop.
        DiskError: something could not be written.
    """
    folder = wish.folder
    with disk_errors(folder, "the prepared data"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        if is_prepared(folder) and (manifest := finished(folder, wish.task, wish.settings, source.identity, screen)):
            return manifest
        state = begin(folder, {**wish.settings, "source": source.identity})
        splits = [_read(wish, source, name, screen) for name in wish.splits]
        for split in splits:
            _bring(wish, source, split, screen, stop)
        files = _fingerprints(wish, source, state, screen, stop)
        _write_left_out(folder, splits)
        manifest = _manifest(wish, source, files, [(split, _write(wish, split, screen, stop)) for split in splits])
        os.sync()  # the images too are on the disk before the folder says that it is whole
        atomic_write(folder / MANIFEST, sealed_json(manifest), what="the manifest")
        (folder / STATE).unlink(missing_ok=True)
        return manifest
    finally:
        lock.release()


def _lock(folder: Path) -> Lock:
    try:
        return Lock.acquire(folder / ".lock")
    except UserError as error:
        if (folder / ".lock").exists() and "in use" in str(error):
            raise UserError(f"{str(error).split('. ')[0]}, which prepares it. Wait for it, or stop it.") from None
        raise


# --- reading ---


def _read(wish: Wish, source: Source | Tables, name: SplitName, screen: Screen) -> Split:
    """The questions of a split, their number compared with what is published."""
    part = wish.release.splits[name]
    screen.note(f"reading {wish.release.title} {part.official}")
    items = source.items(part.official)
    where = f"{wish.release.title}, split '{part.official}'"
    units = wish.release.count(items)
    if not items:
        raise DataError(f"{where}: the release has no questions of it. Is the source another split's?")
    twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    refuse(twice, Path(where), "ids stand more than once", remedy="Download the questions again.")
    right = (part.questions, *part.also)
    if wish.full and part.questions is not None and units not in right:
        expected = " or ".join(f"{number:,}" for number in right if number is not None)
        raise DataError(
            f"{where}: has {units:,} {part.unit}, and the release has {expected}. Download it again. {_PARTIAL}"
        )
    marked = [item.id for item in items if IMAGE_MARK in item.entry.model_dump_json()]
    refuse(marked, Path(where), f"questions hold the text {IMAGE_MARK}", remedy="Remove it there.")
    unsafe = sorted({item.image for item in items if item.image is not None and not _is_inner(item.image)})
    refuse(unsafe, Path(where), "images have names that lead elsewhere", remedy="Download the questions again.")
    return Split(name, part, items[: wish.limit], found=len(items), units=units)


def _is_inner(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(parts) and not name.startswith("/") and "\\" not in name and not {"..", "."} & {*parts, *name.split("/")}
    )


# --- images ---


def _bring(wish: Wish, source: Source | Tables, split: Split, screen: Screen, stop: Callable[[], bool]) -> None:
    """Bring a split's images, and leave out, or refuse, the questions whose image is not good."""
    wanted = {item.image: item for item in reversed(split.items) if item.image is not None}
    wanted = dict(reversed(wanted.items()))
    carrier = Carrier(wish.folder, split.part.official)
    carrier.clean()
    split.brought = Brought(placed={name: each for name, each in carrier.placed().items() if name in wanted})
    left = {name: item for name, item in wanted.items() if name not in split.brought.placed}
    title = f"images of {split.part.official}"
    missing = source.locate(wanted)  # also of what is there: the archives it came from are told
    if not wish.partial:
        _refuse_images(wish, split, missing)
    if left:
        with screen.bar(title, len(wanted)) as bar:
            bar.advance(len(wanted) - len(left))
            carrier.bring(
                source.contents(left, split.part.official), brought=split.brought, advance=bar.advance, stop=stop
            )
        gone = left.keys() - split.brought.placed.keys() - split.brought.failed.keys()
        split.brought.failed |= dict.fromkeys(gone, MISSING)
    if split.brought.failed and not wish.partial:
        _refuse_images(wish, split, split.brought.failed)
    split.left_out = {
        item.id: f"{item.image}: {split.brought.failed[item.image]}"
        for item in split.items
        if item.image in split.brought.failed
    }
    split.items = [item for item in split.items if item.id not in split.left_out]
    if not split.items:
        reason = next(iter(split.left_out.values()))
        raise DataError(f"{wish.release.title}, split '{split.part.official}': no question is left ({reason}).")
    if split.brought.failed:
        screen.note(
            f"{split.part.official}: {len(split.left_out)} questions left out, {len(split.brought.failed)} images"
        )


def _refuse_images(wish: Wish, split: Split, failed: Mapping[str, str]) -> None:
    findings = [f"{name}: {why}" for name, why in failed.items()]
    images = len({item.image for item in split.items if item.image is not None})
    refuse(
        findings,
        Path(f"{wish.release.title}, split '{split.part.official}'"),
        f"of {images} images cannot be used",
        remedy=f"{wish.release.where()} {_PARTIAL}",
    )


# --- writing ---


def _fingerprints(
    wish: Wish, source: Source | Tables, state: dict[str, Any], screen: Screen, stop: Callable[[], bool]
) -> dict[str, dict[str, Any]]:
    """Digests of the files that were read, compared with those that are known."""
    with screen.bar("checksums (MB)", 1) as bar:

        def advance(done: int, total: int) -> None:
            if stop():
                raise Interrupted(GO_ON)
            bar.advance(to=done >> 20, total=max(1, total >> 20))

        files = source.files(state["files"], advance)
    for name, before in state["files"].items():
        if name in files and before.get("sha256") != files[name].get("sha256"):
            raise DataError(
                f"{name}: has changed since {wish.folder} was begun from it. Delete that folder, and begin again."
            )
    if wish.full:
        published = {each.file: each for each in wish.release.downloads if each.md5}
        for name, found in files.items():
            known = published.get(Path(name).name)
            if known and found.get("md5") != known.md5:
                raise DataError(
                    f"{name}: its MD5 is {found.get('md5')}, and that of the published file is {known.md5}. "
                    f"Download it again from {known.url}. {_PARTIAL}"
                )
    write_json(wish.folder / STATE, {**state, "files": files}, what="the state")
    return files


def _write(wish: Wish, split: Split, screen: Screen, stop: Callable[[], bool]) -> dict[str, dict[str, Any]]:
    """A split's files; their sizes and digests."""
    folder, official = wish.folder, split.part.official
    write_questions(folder / f"{official}.jsonl", split.items, official)
    journal_of(folder, official).touch()
    records = PreparedRecords(folder, official, wish.record)
    names = [f"{official}.jsonl", f"images_{official}.jsonl"]
    for kind, write in (("llava", write_llava), ("qwen", write_qwen)):
        if stop():
            raise Interrupted(GO_ON)
        names.append(f"{kind}_{official}.json")
        with screen.bar(names[-1], 1):
            write(folder / names[-1], records)
    ids = [item.id for item in split.items]
    for size in wish.release.samples.get(split.name, ()):
        if size < len(ids):
            names.append(f"samples/{split.name}_{size}_seed{SEED}.json")
            write_sample(folder / names[-1], ids, split=split.name, size=size)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in names}


def _write_left_out(folder: Path, splits: Sequence[Split]) -> None:
    """What was left out, and why, one line each; no file where nothing was."""
    lines = [
        {"split": split.part.official, "id": key, "reason": why}
        for split in splits
        for key, why in split.left_out.items()
    ]
    if lines:
        write_lines(folder / LEFT_OUT, lines, what="the list of what was left out")


def _manifest(
    wish: Wish,
    source: Source | Tables,
    files: Mapping[str, Mapping[str, Any]],
    written: Sequence[tuple[Split, Mapping[str, Any]]],
) -> dict[str, Any]:
    release = wish.release
    splits = {split.part.official: _account(split, files) for split, files in written}
    complete = all(each["questions"] == each["found"] and not each["short"] for each in splits.values())
    return {
        "schema": SCHEMA,
        "task": wish.task,
        "title": release.title,
        "paper": release.paper,
        "home": release.home,
        "licence": release.licence,
        "partial": not complete,
        "asked": {**wish.settings, "kind": source.identity["kind"]},
        "source": {name: {key: each[key] for key in _KEPT if key in each} for name, each in files.items()},
        "splits": splits,
    }


def _account(split: Split, files: Mapping[str, Any]) -> dict[str, Any]:
    """How many there are, of how many: of questions that the source has, and of those that are published."""
    part = split.part
    return {
        "split": split.name,
        "questions": len(split.items),
        "found": split.found,
        "published": {"number": part.questions, "unit": part.unit},
        "short": part.questions is not None and split.units not in (part.questions, *part.also),
        "images": len(split.brought.placed),
        "left_out": len(split.left_out),
        "warnings": dict(split.brought.warnings),
        "files": dict(files),
    }
