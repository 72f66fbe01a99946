"""A folder with a release in it, as downloaded or unpacked, found by the ends of paths.

Where a file lies, and whether it was unpacked, is nobody's business: `train2014.zip`, `train2014/` and
`coco/images/train2014/` all hold `train2014/COCO_train2014_000000000009.jpg`. What is unpacked comes first, then
zip files, then tar files, which must be read from end to end to be searched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.data.prepare.archive import Archive, Member, is_archive, open_archive
from peft_mllm.data.prepare.release import Document, Item, Release
from peft_mllm.errors import DataError

MISSING = "is not in the release"
_CHUNK = 8 << 20

Content = bytes | Path | str
"""Of an image: its bytes, the file that it is, or (text) why there is none."""


@dataclass(frozen=True)
class Found:
    """A file of the release: loose, or a member of an archive."""

    path: str
    file: Path
    archive: Archive | None
    member: Member | None

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return str(self.file) if self.archive is None else f"{self.archive.path}, {self.path}"


class _Index:
    """Files by the ends of their paths."""

    def __init__(self, files: Sequence[Found]):
        self._files = sorted(files, key=lambda each: (each.path.count("/"), each.path))
        self._by_end: dict[int, dict[str, list[Found]]] = {}

    def find(self, end: str) -> list[Found]:
        """All whose path ends so, the least deep first."""
        length = end.count("/") + 1
        if length not in self._by_end:
            table: dict[str, list[Found]] = defaultdict(list)
            for each in self._files:
                parts = each.path.rsplit("/", length)
                table["/".join(parts[-length:])].append(each)
            self._by_end[length] = table
        return self._by_end[length].get(end, [])


class Source:
    """The files of a release below one folder.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path, release: Release):
        if not root.is_dir():
            raise DataError(f"There is no folder {root}. {_remedy(release)}")
        self.root, self.release = root, release
        self.used: set[Path] = set()
        loose, archives = _walk(root)
        self._levels = [_Index(loose)]
        # zip files have a directory; tar files are read from end to end, so they come last
        self._left = [
            sorted(each for each in archives if each.suffix.lower() == ".zip"),
            sorted(each for each in archives if each.suffix.lower() != ".zip"),
        ]
        self._damage: list[DataError] = []

    @property
    def identity(self) -> dict[str, Any]:
        """What a preparation that goes on must find again."""
        return {"kind": "files", "root": str(self.root.resolve())}

    def has(self, *ends: str) -> bool:
        """Whether there is a file whose path ends so."""
        return any(self._find(end) for end in ends)

    def holds(self, end: str) -> bool:
        """Likewise of an image."""
        return bool(self._find(end))

    def read(self, *ends: str) -> Document:
        """The JSON of a file; JSON lines are a list.

        Raises:
            DataError: it is missing, there are several, or it is not JSON.
        """
        for end in ends:
            found = self._find(end)
            if found:
                return self._parse(self._only(found, end))
        for error in self._damage:
            raise error
        raise DataError(f"{self.root}: {' or '.join(ends)} {MISSING}. {_remedy(self.release)}")

    def items(self, official: str) -> list[Item]:
        """The questions of an official split."""
        return self.release.read(self, official)

    def locate(self, items: Mapping[str, Item]) -> dict[str, str]:
        """Note the archives that images come from; why some are nowhere."""
        places, missing = self._places(items)
        self.used |= {found.file for found in places.values() if found.archive is not None}
        return missing

    def contents(self, items: Mapping[str, Item], official: str) -> Iterator[tuple[str, Content]]:
        """The content of each image of a split, archive by archive."""
        places, missing = self._places(items)
        yield from missing.items()
        by_archive: dict[Archive, dict[str, Member]] = defaultdict(dict)
        names: dict[tuple[Archive, str], list[str]] = defaultdict(list)
        for name, found in places.items():
            if found.archive is None or found.member is None:
                yield name, found.file
                continue
            by_archive[found.archive][found.member.path] = found.member
            names[found.archive, found.member.path].append(name)
        for archive, members in by_archive.items():
            for path, data in archive.contents(members):
                for name in names[archive, path]:
                    yield name, data

    def files(
        self, known: Mapping[str, Mapping[str, Any]], advance: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        """Size, time and digests of what was read; those known from before, if unchanged, are not read again.

        Args:
            known: what this gave before.
            advance: told the bytes read and their sum.
        """
        described: dict[str, dict[str, Any]] = {}
        to_read: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path in sorted(self.used):
            status = path.stat()
            name = str(path.relative_to(self.root))
            now = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            before = known.get(name, {})
            if {key: before.get(key) for key in now} == now:
                described[name] = dict(before)
            else:
                to_read[name] = (path, now)
        total, done = sum(now["bytes"] for _, now in to_read.values()), 0
        for name, (path, now) in to_read.items():
            digests = {"sha256": hashlib.sha256()}
            if any(each.md5 and each.file == path.name for each in self.release.downloads):
                digests["md5"] = hashlib.md5(usedforsecurity=False)
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    for digest in digests.values():
                        digest.update(chunk)
                    done += len(chunk)
                    advance(done, total)
            described[name] = now | {kind: digest.hexdigest() for kind, digest in digests.items()}
        return {name: described[name] for name in sorted(described)}

    def _places(self, items: Mapping[str, Item]) -> tuple[dict[str, Found], dict[str, str]]:
        """Where each image lies, and why where it lies nowhere."""
        places: dict[str, Found] = {}
        for name, item in items.items():
            found = next((hits for end in item.find if (hits := self._find(end))), [])
            if found:
                places[name] = found[0]
        why = f"{MISSING}: {self._damage[0]}" if self._damage else MISSING
        return places, {name: why for name in items if name not in places}

    def _find(self, end: str) -> list[Found]:
        level = 0
        while True:
            while level < len(self._levels):
                if found := self._levels[level].find(end):
                    return found
                level += 1
            if not self._left:
                return []
            self._levels.append(_Index(self._open(self._left.pop(0))))

    def _open(self, paths: Sequence[Path]) -> list[Found]:
        """The members of archives. One that is damaged is told of where something is missing: it may be it."""
        found = []
        for path in paths:
            archive = open_archive(path)
            try:
                members = archive.members()
            except DataError as error:
                if "damaged" not in str(error):
                    raise
                self._damage.append(error)
                continue
            # `test.zip` may hold `test/1/image.png` or `1/image.png`: either way its path ends in `test/1/image.png`
            stem = path.name.split(".")[0]
            found += [Found(f"{stem}/{each.path}", path, archive, each) for each in members]
        return found

    def _only(self, found: Sequence[Found], end: str) -> Found:
        """The file that is meant, where there are several."""
        depth = found[0].path.count("/")
        nearest = [each for each in found if each.path.count("/") == depth]
        if len(nearest) > 1 and len({self._bytes(each) for each in nearest}) > 1:
            places = ", ".join(each.place for each in nearest[:4])
            raise DataError(
                f"{self.root}: there are {len(nearest)} different files {end}: {places}. "
                "Give the folder of this data set alone as --source."
            )
        return nearest[0]

    def _bytes(self, found: Found) -> bytes:
        self.used.add(found.file)
        if found.archive is None or found.member is None:
            try:
                return found.file.read_bytes()
            except OSError as error:
                raise DataError(f"{found.file}: cannot be read ({error.strerror}).") from None
        return found.archive.content(found.member)

    def _parse(self, found: Found) -> Document:
        data = self._bytes(found)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{found.place}, byte {error.start}: not UTF-8 text. Download it again.") from None
        try:
            return Document(found.place, json.loads(text))
        except json.JSONDecodeError as whole:
            with suppress(json.JSONDecodeError):
                return Document(found.place, [json.loads(line) for line in text.splitlines() if line.strip()])
            place = f"line {whole.lineno}, column {whole.colno}"
            raise DataError(f"{found.place}, {place}: not valid JSON ({whole.msg}). Download it again.") from None
        except RecursionError:
            raise DataError(f"{found.place}: nested too deeply to be a table of questions.") from None


def _walk(root: Path) -> tuple[list[Found], list[Path]]:
    """All files below a folder, links followed once, and the archives among them."""
    loose, archives, seen = [], [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder, name)
            if is_archive(name):
                archives.append(path)
            elif not name.startswith("."):
                inner = path.relative_to(root).as_posix()
                loose.append(Found(f"{root.resolve().name}/{inner}", path, None, None))
    return loose, archives


def _remedy(release: Release) -> str:
    return f"Get {', '.join(each.file for each in release.downloads)} from {release.home}, and give their folder."
