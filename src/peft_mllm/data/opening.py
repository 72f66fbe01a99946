"""Opening a user's records, in whatever format they are."""

from __future__ import annotations

from pathlib import Path

from peft_mllm.data.formats import RecordFile, Source
from peft_mllm.data.hub import Table


def open_records(path: str | Path, *, image_root: str | Path | None = None) -> Source:
    """The records of a file or directory, in whatever format it is.

    Args:
        path: a JSON list or JSON lines; a Parquet file or a folder of them; a directory by `save_to_disk`.
        image_root: the folder that image paths are relative to, and must stay below; the file's if left out.

    Raises:
        BadDataError: it is missing, unreadable, or of another format.
    """
    place = Path(path)
    if place.is_dir() or place.suffix == ".parquet":
        return Table(place, image_root=image_root)
    return RecordFile(place, image_root=image_root)
