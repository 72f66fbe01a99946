"""A table of lines (CSV, TSV) as coded columns: each distinct text is held once, so a million lines take seconds."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_mllm.errors import DataError

Codes = NDArray[np.int64]

ENDINGS = (".csv", ".tsv")
_AT_ONCE = 5_000
"""Records that are turned into columns together."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        codes: (records,), places in `texts`.
        texts: the distinct cells in order of first appearance, without space around them.
    """

    name: str
    codes: Codes
    texts: tuple[str, ...]

    def first(self, code: int) -> int:
        """The first record with a text."""
        return int(np.argmax(self.codes == code))


@dataclass(frozen=True)
class Table:
    """A file's columns by name, in lower case and in the file's order."""

    path: Path
    columns: Mapping[str, Column]
    count: int
    last_line: int

    def lines(self, *records: int) -> list[int]:
        """The lines of the file on which records stand."""
        if self.last_line == self.count + 1:
            return [record + 2 for record in records]
        # a cell in quotes may take several lines, and a line may be blank: they are counted
        wanted, found = set(records), {}
        with _Reader(self.path) as reader:
            next(reader)
            record = 0
            for row in reader:
                if row:
                    if record in wanted:
                        found[record] = reader.line_num
                    record += 1
        return [found[record] for record in records]

    def place(self, record: int) -> str:
        """`results.csv:17`, for a message."""
        return f"{self.path}:{self.lines(record)[0]}"


def read_columns(path: Path) -> Table:
    """Read a table; the first line has the names.

    The cells of a `.tsv` are parted by tabs, those of a `.csv` by what its first line has most of: comma, semicolon
    or tab. Columns without a name are left out.

    Raises:
        DataError: it cannot be read, has no lines, or a line has more or fewer cells than names; with file and line.
    """
    try:
        with _Reader(path) as reader:
            names = [name.strip().lower() for name in next(reader, [])]
            if not any(names):
                raise DataError(f"{path}: is empty. Its first line has the names of the columns: method, seed, score.")
            if twice := next((name for name in names if name and names.count(name) > 1), ""):
                raise DataError(f"{path}:1: two columns are called '{twice}'. Rename one.")
            known = [_Coding() for _ in names]
            parts: list[list[Codes]] = [[] for _ in names]
            for rows in _in_parts(reader):
                for place, cells in enumerate(_columns(path, rows, len(names), reader.line_num)):
                    parts[place].append(known[place].coded(cells))
            last_line = reader.line_num
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is no table ({error}).") from error
    if not parts[0]:
        raise DataError(f"{path}: has names and no lines below them.")
    columns = [
        Column(name, np.concatenate(part), tuple(each.places))
        for name, each, part in zip(names, known, parts, strict=True)
    ]
    return Table(path, {column.name: column for column in columns if column.name}, len(columns[0].codes), last_line)


class _Coding:
    """Numbers for texts, in order of first appearance."""

    def __init__(self) -> None:
        self.places: defaultdict[str, int] = defaultdict()
        self.places.default_factory = self.places.__len__

    def coded(self, cells: Sequence[str]) -> Codes:
        return np.fromiter(map(self.places.__getitem__, map(str.strip, cells)), np.int64, len(cells))


class _Reader:
    """A csv reader that closes its file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open(encoding="utf-8-sig", newline="")
        first = self._file.readline()
        self._file.seek(0)
        apart = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        self._rows = csv.reader(self._file, delimiter=apart)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[list[str]]:
        return self._rows

    def __next__(self) -> list[str]:
        return next(self._rows)

    @property
    def line_num(self) -> int:
        return self._rows.line_num


def _in_parts(reader: _Reader) -> Iterator[list[list[str]]]:
    rows = filter(None, iter(reader))  # a blank line is no record
    while part := list(islice(rows, _AT_ONCE)):
        yield part


def _columns(path: Path, rows: list[list[str]], width: int, last_line: int) -> list[tuple[str, ...]]:
    try:
        columns = list(zip(*rows, strict=True))
        if len(columns) == width:
            return columns
    except ValueError:
        pass  # which line it is, is found below
    wrong = next(row for row in rows if len(row) != width)
    with _Reader(path) as again:
        line = next((again.line_num for row in again if row and len(row) != width), last_line)
    raise DataError(
        f"{path}:{line}: has {len(wrong)} cells, and the first line names {width} columns. Put a cell that holds the "
        "separator in quotes."
    )
