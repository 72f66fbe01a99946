"""A user's records: a JSON list, JSON lines, or a table of Hugging Face's `datasets`; read one record at a time."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from peft_mllm.data.parse import Parsed, Root, parse
from peft_mllm.data.problems import BadDataError, Problem, nearest_file, problem, refuse
from peft_mllm.data.scan import MAX_RECORD_BYTES, Index, foreign_kind, scan
from peft_mllm.record import Record


class Source(Sequence[Record]):
    """The records of a file or a table, each parsed when it is asked for.

    Attributes:
        path: as the user wrote it.
        name: its last part, for messages.
        is_list: whether many records may share a line, so that their numbers are told.
    """

    path: Path
    name: str
    is_list: bool
    _root: Root

    @overload
    def __getitem__(self, number: int) -> Record: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Record]: ...
    def __getitem__(self, number: int | slice) -> Record | Sequence[Record]:
        """A record by its number from 0.

        Raises:
            BadDataError: the record has an error, or the list breaks somewhere: part of a file is not used.
        """
        if isinstance(number, slice):
            return Selection(self, range(*number.indices(len(self))))
        if self.broken is not None:
            line, broken = self.broken
            raise BadDataError([broken], f"{self.path}:{line}")
        number = range(len(self))[number]
        parsed = self.parse(number)
        if parsed.record is None:
            errors = [each for each in parsed.problems if each.severity == "error"]
            raise BadDataError(errors, f"{self.path}:{self.line(number)}")
        return parsed.record

    @property
    def image_root(self) -> Path:
        """The resolved folder of the images."""
        return self._root.path

    @property
    @abstractmethod
    def broken(self) -> tuple[int, Problem] | None:
        """The line and the reason why the file as a whole cannot be used."""

    @abstractmethod
    def line(self, number: int) -> int:
        """The line on which a record begins, from 1; in a table the row."""

    @abstractmethod
    def parse(self, number: int) -> Parsed:
        """A record with all that its text shows to be wrong; raises nothing for what the record may hold."""

    def seal(self, digests: Mapping[str, str]) -> None:
        """Hold the images to what was checked: one with other content is an error when it is loaded.

        Args:
            digests: sha256 by the image's identity; `Report.images`.
        """
        self._root = replace(self._root, seals=digests)

    def keep_addresses(self) -> None:
        """Take images at addresses for images that can be written down again, though not loaded."""
        self._root = replace(self._root, addresses=True)


class RecordFile(Source):
    """The records of a JSON file.

    One pass over the bytes finds where each record begins (24 bytes of memory for each); after that, a record
    costs one read. Safe to use from threads, in forked workers, and to pickle.

    Args:
        path: a JSON list of records, or JSON lines; recognised by content, not by name.
        image_root: the folder that image paths are relative to, and must stay below; the file's if left out.

    Raises:
        BadDataError: the file or the image root is missing, unreadable, or of another format. A list that
            breaks inside is found by `check`, and by asking for a record.
    """

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None):
        self.path = Path(path)
        self.name = self.path.name
        self._root = Root(folder_of_images(self.path, image_root), {})
        self._descriptor: int | None = None
        self._seen = (0, 0)
        self._index = self._scan()
        self.is_list = self._index.is_list

    def __len__(self) -> int:
        return len(self._index)

    @property
    def broken(self) -> tuple[int, Problem] | None:
        """The line and the reason why the file as a whole cannot be used."""
        if (at := self._index.broken) is not None:
            return at.line, problem("file-broken", column=at.column, why=at.why)
        return None if len(self) else (1, problem("file-empty"))

    def line(self, number: int) -> int:
        """The line on which a record begins, from 1."""
        return self._index.lines[number]

    def raw(self, number: int) -> bytes:
        """A record's bytes as they stand in the file, without the line break.

        Raises:
            BadDataError: the file has been written to since it was opened.
        """
        descriptor = self._open()
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != self._seen:
            raise refuse("file-changed", path=self.path)
        start, end = self._index.starts[number], self._index.ends[number]
        parts = []
        while start < end and (part := os.pread(descriptor, end - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts).strip(b"\r\n")

    def parse(self, number: int) -> Parsed:
        """A record with all that its text shows to be wrong; raises nothing for what the record may hold."""
        line = self.line(number)
        # Many records of a list may share a line, so their number tells them apart.
        default_id = f"{self.name}#{number + 1}" if self.is_list else f"{self.name}:{line}"
        if (size := self._index.ends[number] - self._index.starts[number]) > MAX_RECORD_BYTES:
            limit = f"{MAX_RECORD_BYTES:,}"
            return Parsed(None, (problem("record-too-large", size=f"{size:,}", limit=limit),), default_id)
        return parse(self.raw(number), source=f"{self.name}:{line}", default_id=default_id, root=self._root)

    def _scan(self) -> Index:
        with open(self._open(), "rb", closefd=False) as file:
            if what := foreign_kind(file.read(64)):
                raise refuse("file-format", path=self.path, what=what)
            file.seek(0)
            index = scan(file)
            if not index.is_list and len(index) and file.seek(index.starts[0]) >= 0:
                self._refuse_one_object(file.readline(4))
        return index

    def _refuse_one_object(self, first_line: bytes) -> None:
        """An object over several lines is neither of the two formats; line by line it is only noise."""
        if first_line.strip() == b"{":
            raise refuse("file-format", path=self.path, what="one JSON object over several lines")

    def _open(self) -> int:
        """The file's descriptor; `pread` needs no position, so threads and forks may share it."""
        if self._descriptor is None:
            try:
                if not self.path.is_file():
                    raise _no_file(self.path)
                self._descriptor = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise refuse("file-unreadable", path=self.path, why=error.strerror) from None
            except ValueError:
                raise refuse("file-missing", path=self.path) from None
            status = os.fstat(self._descriptor)
            self._seen = self._seen if any(self._seen) else (status.st_size, status.st_mtime_ns)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # just tested

    def __repr__(self) -> str:
        return f"RecordFile({str(self.path)!r}, {len(self)} records)"


class Selection(Sequence[Record]):
    """Some records of a sequence, in the order given; as lazy as that is."""

    def __init__(self, records: Sequence[Record], numbers: Iterable[int]):
        self._records = records
        self._numbers = numbers if isinstance(numbers, range) else array("Q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Record: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Record]: ...
    def __getitem__(self, number: int | slice) -> Record | Sequence[Record]:
        if isinstance(number, slice):
            return Selection(self._records, self._numbers[number])
        return self._records[self._numbers[number]]


def folder_of_images(path: Path, root: str | Path | None) -> Path:
    """The resolved folder that image paths are relative to."""
    folder = path.parent if root is None else Path(root)
    if root is not None and not folder.is_dir():
        raise refuse("root-missing", path=folder, hint=nearest_file(folder))
    return Path(os.path.realpath(folder))


def _no_file(path: Path) -> BadDataError:
    if path.exists():
        return refuse("file-unreadable", path=path, why="it is not a regular file")
    return refuse("file-missing", path=path, hint=nearest_file(path))
