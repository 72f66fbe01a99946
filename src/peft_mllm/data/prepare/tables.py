"""A release as tables with an image column: a hub's copy, `save_to_disk` folders, parquet files.

All through the `datasets` library, the extra `hub`. Images are taken as the bytes that were put in, not decoded and
encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_mllm.data.prepare.release import Item, Release
from peft_mllm.data.prepare.source import Content
from peft_mllm.errors import DataError, UserError


class Tables:
    """The tables of a release.

    Args:
        release: what is read.
        root: a folder of tables; None is the hub.

    Raises:
        DataError: the data set is on no hub, or there is no such folder.
    """

    def __init__(self, release: Release, root: Path | None):
        if release.hub is None:
            raise DataError(f"{release.title} is on no hub in a form that is read here. {release.where()}")
        if root is not None and not root.is_dir():
            raise DataError(f"There is no folder {root}.")
        self.release, self.hub, self.root = release, release.hub, root
        self._loaded: dict[str, Any] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What a preparation that goes on must find again."""
        where = str(self.root.resolve()) if self.root else f"{self.hub.path}@{self.hub.revision or 'main'}"
        return {"kind": "tables", "root": where}

    def items(self, official: str) -> list[Item]:
        """The questions of an official split, read without the images."""
        table = self._table(official)
        lacking = [name for name in (self.hub.image, *self.hub.columns) if name not in table.column_names]
        if lacking:
            columns = ", ".join(table.column_names)
            raise DataError(f"{self._place(official)}: has no column {', '.join(lacking)} among {columns}.")
        rows = list(table.remove_columns(self.hub.image))
        there = _has_image(table, self.hub.image)
        return self.hub.read([{**row, "has_image": has} for row, has in zip(rows, there, strict=True)], official)

    def contents(self, items: Mapping[str, Item], official: str) -> Iterator[tuple[str, Content]]:
        """The bytes of each image of a split."""
        table = self._table(official).select_columns(self.hub.image)
        for name, item in items.items():
            value = None if item.row is None else table[item.row][self.hub.image]
            yield name, _bytes_of(value)

    def locate(self, items: Mapping[str, Item]) -> dict[str, str]:
        """Why images are nowhere: each is in its row, or said to be missing when it is read."""
        return {}

    def files(
        self, known: Mapping[str, Mapping[str, Any]], advance: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        """A fingerprint of each table instead of a digest of files."""
        return {
            official: {"rows": len(table), "fingerprint": getattr(table, "_fingerprint", "")}
            for official, table in self._loaded.items()
        }

    def _table(self, official: str) -> Any:
        if official not in self._loaded:
            self._loaded[official] = _undecoded(self._load(official), self.hub.image)
        return self._loaded[official]

    def _load(self, official: str) -> Any:
        datasets = library()
        if official not in self.hub.splits:
            raise DataError(
                f"{self.hub.path} has no split '{official}' of {self.release.title}. {self.release.where()}"
            )
        split = self.hub.splits[official]
        if self.root is None:
            try:
                return datasets.load_dataset(self.hub.path, self.hub.config, split=split, revision=self.hub.revision)
            except Exception as error:  # the library raises whatever its many parts do
                raise DataError(f"{self.hub.path} cannot be loaded from the hub: {_one_line(error)}.") from error
        return _local(datasets, self.root, split)

    def _place(self, official: str) -> str:
        return str(self.root) if self.root else f"{self.hub.path}, {official}"


def library() -> Any:
    """The `datasets` library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("Tables are read by the library `datasets`: pip install 'peft-mllm[hub]'.") from None
    return datasets


def is_tables(root: Path) -> bool:
    """Whether a folder holds tables: one that `save_to_disk` wrote, or parquet files."""
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or any(root.glob("*.parquet")) or any(root.glob("data/*.parquet"))


def _local(datasets: Any, root: Path, split: str) -> Any:
    """A split of a folder of tables."""
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(root))
        except Exception as error:
            raise DataError(f"{root}: cannot be loaded: {_one_line(error)}.") from error
        if not isinstance(loaded, Mapping):
            return loaded
        if split not in loaded:
            raise DataError(f"{root}: has no split '{split}' among {', '.join(loaded) or 'none'}.")
        return loaded[split]
    files = sorted(str(path) for path in root.rglob("*.parquet") if _is_of(path, root, split))
    if not files:
        raise DataError(f"{root}: has neither a saved data set nor parquet files named like {split}-00000.parquet.")
    try:
        # a fixed name for the one split: the files have been chosen already
        return datasets.load_dataset("parquet", data_files={"chosen": files}, split="chosen")
    except Exception as error:
        raise DataError(f"{root}: its parquet files of '{split}' cannot be read: {_one_line(error)}.") from error


def _is_of(path: Path, root: Path, split: str) -> bool:
    """`test-00000-of-00004.parquet`, or `test/0000.parquet`."""
    return path.name.split("-")[0].split(".")[0] == split or path.parent.name == split


def _undecoded(table: Any, column: str) -> Any:
    """The table with its images as they were put in."""
    if column not in table.column_names:
        return table
    return table.cast_column(column, library().Image(decode=False))


def _has_image(table: Any, column: str) -> list[bool]:
    """Of each row, without reading the images."""
    batches = table.select_columns(column).with_format("arrow").iter(batch_size=1000)
    return [bool(valid) for batch in batches for valid in batch[column].is_valid().to_pylist()]


def _bytes_of(value: Any) -> Content:
    """What a cell of the image column holds: bytes, or the path of a file."""
    if not isinstance(value, Mapping):
        return "its row has no image"
    if value.get("bytes"):
        return bytes(value["bytes"])
    path = value.get("path")
    return Path(path) if path and Path(path).is_file() else "its row has no image"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
