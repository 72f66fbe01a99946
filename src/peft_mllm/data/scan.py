"""Finding where each record of a JSON list or a JSON-lines file begins and ends, in one pass over its bytes.

Nothing is parsed and the file is never wholly in memory: a list may be one line of many gigabytes. The pass
follows only quotes and brackets, so a record with a fault inside is still told from its neighbours; a list
whose brackets or quotes do not close breaks there, and what follows cannot be told apart.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20
"""A larger record is refused rather than parsed: text with image names is never this long."""

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
# Everything up to the next bracket outside of strings. A JSON string holds no line break, so a quote that is
# not closed on its line stops the match. Possessive (++): it never goes back, so nothing is noted.
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+")*+')
_OPEN_STRING = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+\\?')

_FOREIGN = (
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file without the name .parquet"),
    (b"version https://git-lfs", "a git-LFS pointer (run `git lfs pull`)"),
    (b"<", "an HTML or XML page"),
)


class Break(NamedTuple):
    """Where a list can no longer be followed: line and column from 1, column in bytes."""

    line: int
    column: int
    why: str


@dataclass
class Index:
    """Where the records are: 24 bytes for each.

    Attributes:
        is_list: one JSON list; otherwise JSON lines.
        starts, ends: byte offsets of each record.
        lines: the line on which each begins, from 1.
        broken: where the list breaks, if it does.
    """

    is_list: bool
    starts: array[int] = field(default_factory=lambda: array("Q"))
    ends: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("Q"))
    broken: Break | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, start: int, end: int, line: int) -> None:
        """Append one record."""
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)


def foreign_kind(head: bytes) -> str | None:
    """What a file is by its first bytes, if it is surely not JSON."""
    return next((what for magic, what in _FOREIGN if head.startswith(magic)), None)


def scan(file: BinaryIO) -> Index:
    """Index a file: a list if its first character is `[`, otherwise JSON lines."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    while (byte := file.read(1)) and byte in _SPACE:
        pass
    is_list = byte == b"["
    if is_list:
        return _ListScan(file, start).run()
    file.seek(start)
    return _scan_lines(file, start)


def _scan_lines(file: BinaryIO, offset: int) -> Index:
    index = Index(is_list=False)
    for line, (start, end, blank) in enumerate(_lines(file, offset), start=1):
        if not blank:
            index.add(start, end, line)
    return index


def _lines(file: BinaryIO, offset: int) -> Iterator[tuple[int, int, bool]]:
    """Each line as (start, end, is it blank), however long, in pieces of bounded size."""
    start, end, blank = offset, offset, True
    while piece := file.readline(CHUNK_BYTES):
        end += len(piece)
        blank = blank and not piece.strip(_SPACE)
        if piece.endswith(b"\n"):
            yield start, end, blank
            start, blank = end, True
    if end > start:
        yield start, end, blank


class _Broken(Exception):  # noqa: N818 - leaves the scan's loops; never seen outside
    def __init__(self, offset: int, why: str):
        super().__init__(why)
        self.offset = offset
        self.why = why


class _ListScan:
    """One pass over a JSON list.

    Attributes:
        buffer: the file's bytes from offset `base`; `at` is the position in it.
        line: of offset `counted`, up to which line breaks have been counted.
        record: the offset where the record being passed begins; None between records.
    """

    def __init__(self, file: BinaryIO, start: int):
        file.seek(start)
        self.file = file
        self.buffer = b""
        self.base = self.counted = start
        self.at = 0
        self.line = 1
        self.record: int | None = None

    def run(self) -> Index:
        index = Index(is_list=True)
        try:
            self._to_bracket()
            self.at += 1
            while self._to_record(first=not len(index)):
                self.record, line = self.base + self.at, self.line
                self._over_record()
                index.add(self.record, self.base + self.at, line)
                self.record = None
            self._nothing_after()
        except _Broken as broken:
            index.broken = self._explain(broken)
        return index

    def _to_record(self, *, first: bool) -> bool:
        """Move to the next record's opening bracket; False at the bracket that closes the list."""
        gap = self._to_bracket(keep=True)
        start, bracket = self.base + self.at - len(gap), self.buffer[self.at]
        closes = bracket in b"]}"
        self._check_gap(gap, start, wanted=b"" if first or closes else b",")
        if bracket == ord("}"):
            raise _Broken(self.base + self.at, "a brace closes that was not opened")
        self._count_lines(self.base + self.at)
        self.at += closes
        return not closes

    def _check_gap(self, gap: bytes, start: int, *, wanted: bytes) -> None:
        content = gap.strip(_SPACE)
        if content == wanted:
            return
        place = start + len(gap) - len(gap.lstrip(_SPACE))
        if not content:
            raise _Broken(place, "a comma is missing between two records")
        if junk := content.strip(b"," + _SPACE):
            raise _Broken(start + gap.index(junk), "a record must be an object in braces")
        raise _Broken(place, "there is a comma too many")

    def _over_record(self) -> None:
        """Move behind the bracket that closes the one here."""
        opened = bytearray()
        while True:
            bracket = self.buffer[self.at]
            if bracket in b"{[":
                opened.append(bracket)
            elif opened.pop() != bracket - 2:  # in ASCII, `]` is `[` + 2 and `}` is `{` + 2
                raise _Broken(self.base + self.at, f"'{chr(bracket)}' closes what another bracket opened")
            self.at += 1
            if not opened:
                return
            self._to_bracket()

    def _nothing_after(self) -> None:
        while True:
            rest = self.buffer[self.at :]
            if junk := rest.strip(_SPACE):
                raise _Broken(self.base + self.at + rest.index(junk), "there is more after the list's end")
            self.at = len(self.buffer)
            if not self._read_more():
                return

    def _to_bracket(self, *, keep: bool = False) -> bytes:
        """Move to the next bracket outside of strings; return what was passed over, if it is to be kept."""
        while True:
            end = _end(_TO_BRACKET, self.buffer, self.at)
            in_string = self.buffer[end : end + 1] == b'"'
            if in_string and _end(_OPEN_STRING, self.buffer, end) < len(self.buffer):
                raise _Broken(self.base + end, "a quote is not closed on its line")
            if end < len(self.buffer) and not in_string:
                passed = self.buffer[self.at : end] if keep else b""
                self.at = end
                return passed
            if not keep:
                self.at = end
            if not self._read_more():
                raise _Broken(self.base + len(self.buffer), "the file ends before the list does")

    def _read_more(self) -> bool:
        """Drop the buffer before `at`, and read at least as much as is kept: a long string stays linear."""
        self._count_lines(self.base + self.at)
        kept = self.buffer[self.at :]
        more = self.file.read(max(CHUNK_BYTES, len(kept)))
        self.buffer = kept + more
        self.base += self.at
        self.at = 0
        return bool(more)

    def _count_lines(self, offset: int) -> None:
        self.line += self.buffer.count(b"\n", self.counted - self.base, offset - self.base)
        self.counted = offset

    def _explain(self, broken: _Broken) -> Break:
        """The place of a break, as exact as a parser gives it.

        A bracket too few shows only where the brackets no longer add up, often at the end of the file; a
        parser stops at the first character that cannot follow.
        """
        offset, why = broken.offset, broken.why
        if self.record is not None and (strict := _strict_break(self.file, self.record)):
            offset, why = min(strict, (offset, why), key=lambda place: place[0])
        return Break(*_line_and_column(self.file, offset), why)


def _end(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _strict_break(file: BinaryIO, start: int) -> tuple[int, str] | None:
    """Where and why a parser refuses the value at an offset."""
    file.seek(start)
    text = file.read(MAX_RECORD_BYTES).decode("utf-8", "surrogateescape")
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return start + len(text[: error.pos].encode("utf-8", "surrogateescape")), error.msg
    except (ValueError, RecursionError):
        return None
    return None


def _line_and_column(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Line and column (both from 1, in bytes) of an offset."""
    file.seek(0)
    line, line_start, at = 1, 0, 0
    while at < offset and (piece := file.read(min(CHUNK_BYTES, offset - at))):
        if breaks := piece.count(b"\n"):
            line += breaks
            line_start = at + piece.rindex(b"\n") + 1
        at += len(piece)
    return line, offset - line_start + 1
