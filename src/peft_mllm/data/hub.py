"""A table of Hugging Face's `datasets` as records: a directory by `save_to_disk`, or Parquet files.

A row has `messages` or `conversations` (a list of turns), `image` or `images` (the bytes of image files, or paths),
and perhaps `id`; every other column is kept in the record's `meta`, and so is what a text column `meta_json` holds.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from peft_mllm.data.formats import Source, folder_of_images
from peft_mllm.data.held import HeldImage
from peft_mllm.data.parse import Parsed, Root, read_fields
from peft_mllm.data.problems import BadDataError, Problem, nearest_file, problem, refuse

META = "meta_json"
"""Column for a record's `meta` as JSON: keys that not every record has, and values of several types, have no column."""

_TURNS = ("messages", "conversations")
_IMAGES = ("image", "images")
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}$")


class _Rows(Protocol):
    """What is asked of pyarrow and `datasets`, in one form."""

    schema: Any

    def __len__(self) -> int: ...

    def at(self, number: int) -> Any:
        """One row as a pyarrow table."""


class Table(Source):
    """The rows of a table; images are read when they are asked for.

    Args:
        path: a Parquet file, a folder of those of one split, or a directory written by `save_to_disk`.
        image_root: where images are that the table names by path; its own folder if left out.

    Raises:
        BadDataError: it is missing, unreadable, has several splits, or lacks the columns of a conversation.
    """

    is_list = True

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None):
        self.path = Path(path)
        self.name = self.path.name or self.path.resolve().name
        if not self.path.exists():
            raise refuse("file-missing", path=self.path, hint=nearest_file(self.path))
        own = self.path / "any" if self.path.is_dir() else self.path
        self._root = Root(folder_of_images(own, image_root), {})
        self._rows: _Rows | None = None
        self._images = self._image_columns()

    def __len__(self) -> int:
        return len(self._open())

    @property
    def broken(self) -> tuple[int, Problem] | None:
        """Only that there are no rows; a table that cannot be read cannot be opened either."""
        return None if len(self) else (1, problem("file-empty"))

    def line(self, number: int) -> int:
        """The row, from 1."""
        return number + 1

    def parse(self, number: int) -> Parsed:
        """A row as a record, with all that shows without opening its images."""
        where = {"source": f"{self.name}:{number + 1}", "default_id": f"{self.name}#{number + 1}"}
        try:
            return read_fields(self._fields(number), root=self._root, **where)
        except BadDataError as error:
            return Parsed(None, error.problems, where["default_id"])

    def _fields(self, number: int) -> dict[str, Any]:
        """A row as the keys of a record."""
        row = self._open().at(number)
        fields: dict[str, Any] = {}
        for column in row.column_names:
            value = row.column(column)[0]
            if not value.is_valid and column in (*_TURNS, *_IMAGES, "id", META):
                continue
            if column in self._images:
                fields[column] = [self._image(number, column, i, each) for i, each in enumerate(_cells(value))]
            elif column in _TURNS:
                fields[column] = _without_nulls(value.as_py())
            elif column == META:
                fields |= _meta(value.as_py())
            else:
                fields[column] = value.as_py()
        return fields

    def _image(self, number: int, column: str, index: int, cell: Any) -> HeldImage | str | None:
        """An image by its bytes, or else the path that is to be found."""
        path = cell["path"].as_py() if "path" in cell.type.names else None
        if not cell.is_valid or not cell["bytes"].is_valid:
            return path
        identity = f"{self.path}#{number}.{column}.{index}"
        name = path or f"{index + 1} of row {number + 1}"
        read = functools.partial(self.image_bytes, number, column, index)
        return HeldImage(read, identity=identity, name=name, seal=self._root.seals.get(identity))

    def image_bytes(self, number: int, column: str, index: int) -> bytes:
        """The bytes of an image file that a row holds."""
        data: bytes = _cells(self._open().at(number).column(column)[0])[index]["bytes"].as_py()
        return data

    def _image_columns(self) -> tuple[str, ...]:
        """The columns that hold image files.

        Raises:
            BadDataError: a record would lose some of them, or there is no conversation.
        """
        schema = self._open().schema
        if not any(name in schema.names for name in _TURNS):
            raise refuse("table-columns", path=self.path, what=f"columns {', '.join(schema.names)}")
        holding = tuple(name for name in schema.names if _holds_images(schema.field(name).type))
        if other := [name for name in holding if name not in _IMAGES]:
            raise refuse("table-columns", path=self.path, what=f"images in the column {', '.join(other)}")
        return holding

    def _open(self) -> _Rows:
        if self._rows is None:
            self._rows = _open(self.path)
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __repr__(self) -> str:
        return f"Table({str(self.path)!r}, {len(self)} records)"


def _cells(value: Any) -> list[Any]:
    """A cell's image or images, as scalars of pyarrow: bytes that nobody asks for are not copied."""
    return [value] if hasattr(value, "keys") else list(value.values)


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_images(kind.value_type)
    return types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}


def _without_nulls(value: Any) -> Any:
    """Turns without the keys that Arrow fills in where other turns have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _meta(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise refuse("json-broken", column=1, why=f"{META}: {error}") from None
    if not isinstance(value, dict):
        raise refuse("not-an-object", what=f"without an object in {META}")
    return value


# --- files ---


def _open(path: Path) -> _Rows:
    try:
        import pyarrow
    except ImportError:
        raise refuse("table-library", path=path) from None
    try:
        return _Saved(path) if path.is_dir() and not _parquet_files(path) else _Parquet(path)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise refuse("table-broken", path=path, why=why) from None


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


class _Saved:
    """A directory by `save_to_disk`, mapped into memory."""

    def __init__(self, path: Path):
        from datasets import load_from_disk

        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            raise refuse("table-splits", path=path, names=", ".join(splits), one=path / splits[0])
        if not (path / "state.json").is_file():
            raise ValueError("it has neither Parquet files nor what `save_to_disk` writes")
        self._data = load_from_disk(str(path)).with_format("arrow")
        self.schema = self._data.features.arrow_schema

    def __len__(self) -> int:
        return len(self._data)

    def at(self, number: int) -> Any:
        """One row."""
        return self._data[number : number + 1]


class _Group(NamedTuple):
    """A row group of a file: what Parquet reads at once."""

    file: int
    group: int
    start: int
    end: int


class _Parquet:
    """Parquet files of one split; the row group read last is kept, since its neighbours are asked for next."""

    def __init__(self, path: Path):
        from pyarrow import parquet

        paths = _parquet_files(path) if path.is_dir() else [path]
        names = {found[1] for each in paths if (found := _SPLIT.match(each.stem))}
        if len(names) > 1 or (not names and len(paths) > 1):
            listed = sorted(names or {each.stem for each in paths})
            raise refuse("table-splits", path=path, names=", ".join(listed), one=paths[0])
        self._files = [parquet.ParquetFile(each, memory_map=True) for each in paths]
        self.schema = self._files[0].schema_arrow
        self._groups: list[_Group] = []
        for i, file in enumerate(self._files):
            if file.schema_arrow.names != self.schema.names:
                raise ValueError(f"{paths[i].name} has other columns than {paths[0].name}")
            for group in range(file.num_row_groups):
                start = self._groups[-1].end if self._groups else 0
                self._groups.append(_Group(i, group, start, start + file.metadata.row_group(group).num_rows))
        self._read: tuple[_Group, Any] | None = None

    def __len__(self) -> int:
        return self._groups[-1].end if self._groups else 0

    def at(self, number: int) -> Any:
        """One row."""
        read = self._read
        if read is None or not read[0].start <= number < read[0].end:
            group = next(each for each in self._groups if each.start <= number < each.end)
            self._read = read = (group, self._files[group.file].read_row_group(group.group))
        return read[1].slice(number - read[0].start, 1)
