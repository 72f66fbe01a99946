"""Records as a table of Hugging Face's `datasets`: `id`, `messages`, `images` with their bytes, and `meta_json`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from peft_mllm.data.held import HeldImage
from peft_mllm.data.hub import META
from peft_mllm.data.images import FileImage, read_file
from peft_mllm.data.parse import Parsed, Root, read_fields
from peft_mllm.data.problems import refuse
from peft_mllm.errors import DataError
from peft_mllm.files import disk_errors, new_directory, sync_directory, sync_file, temporary_name
from peft_mllm.record import Record

ROWS_AT_ONCE = 100
"""Rows of a group, which is read at once: with images, some tens of megabytes."""


def write_table(path: Path, records: Callable[[], Iterator[Record]]) -> None:
    """Write records with their images.

    Args:
        path: a `.parquet` file; anything else becomes a directory that `datasets.load_from_disk` loads.
        records: gives them anew each time.

    Raises:
        DataError: the library is missing.
        DiskError: it cannot be written.
    """
    schema = _schema()
    with disk_errors(path, "the records"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        _write_parquet(path, schema, records())
    else:
        _save_to_disk(path, schema, records())


def read_back(record: Record, root: Root) -> Parsed:
    """What reading a record's row would give, its images by their content."""
    row = _row(record)
    images = [
        HeldImage(partial(bytes, each["bytes"]), identity=f"{i}", name=each["path"])
        for i, each in enumerate(row["images"])
    ]
    fields = {"id": row["id"], "messages": row["messages"], **({"images": images} if images else {})}
    return read_fields(fields | json.loads(row[META] or "{}"), source=record.source, default_id="", root=root)


def _row(record: Record) -> dict[str, Any]:
    try:
        meta = json.dumps(dict(record.meta), ensure_ascii=False, allow_nan=False) if record.meta else None
    except (TypeError, ValueError) as error:
        raise refuse(
            "format-cannot-hold", format="hf", why=f"a value of its other keys is not JSON ({error})"
        ) from None
    return {
        "id": record.id,
        "messages": [{"role": turn.role, "content": turn.text} for turn in record.turns],
        "images": [{"bytes": _bytes(image), "path": image.name} for image in record.images],  # type: ignore[attr-defined]
        META: meta,
    }


def _bytes(image: Any) -> bytes:
    if isinstance(image, FileImage):
        return read_file(image.path, image.name)
    data: bytes = image.read()
    return data


def _schema() -> Any:
    """The columns, with what tells `datasets` that bytes are images."""
    try:
        from datasets import Features, Image, Value
    except ImportError:
        raise DataError("Tables are written by `datasets`: install it with `pip install 'peft-mllm[hub]'`.") from None
    text = Value("string")
    columns = {"id": text, "messages": [{"role": text, "content": text}], "images": [Image()], META: text}
    return Features(columns).arrow_schema


def _tables(schema: Any, records: Iterator[Record]) -> Iterator[Any]:
    import pyarrow

    for rows in _batched(records):
        yield pyarrow.Table.from_pylist([_row(record) for record in rows], schema=schema)


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    rows: list[Record] = []
    for record in records:
        rows.append(record)
        if len(rows) == ROWS_AT_ONCE:
            yield rows
            rows = []
    if rows:
        yield rows


def _write_parquet(path: Path, schema: Any, records: Iterator[Record]) -> None:
    from pyarrow import parquet

    temporary = temporary_name(path)
    with disk_errors(path, "the records"):
        try:
            with parquet.ParquetWriter(temporary, schema) as writer:
                for table in _tables(schema, records):
                    writer.write_table(table)
            sync_file(temporary)
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _save_to_disk(path: Path, schema: Any, records: Iterator[Record]) -> None:
    import pyarrow
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    with ExitStack() as stack:
        made = stack.enter_context(new_directory(path, what="the records"))
        parts = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-")))
        with pyarrow.OSFile(str(parts / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for table in _tables(schema, records):
                writer.write_table(table)
        Dataset.from_file(str(parts / "rows.arrow")).save_to_disk(str(made))
