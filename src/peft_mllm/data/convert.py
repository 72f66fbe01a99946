"""From one format of records to another without losing anything: LLaVA JSON, Qwen-VL JSON, messages, tables.

Every record is written, read back, and compared before the first byte of the new file is written; what a format
cannot hold is an error that says so. What is compared is the record as it is used: id, turns, images, other keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peft_mllm.data.formats import Source
from peft_mllm.data.held import DataImage, HeldImage, RemoteImage
from peft_mllm.data.images import FileImage
from peft_mllm.data.inline import AS_WRITTEN, CAPTIONS, MAX_PATH_BYTES, pack
from peft_mllm.data.parse import Parsed, Root, parse
from peft_mllm.data.problems import BadDataError, problem, shown
from peft_mllm.errors import DataError
from peft_mllm.files import atomic_write, atomic_write_pieces, disk_errors
from peft_mllm.record import Record

Format = Literal["llava", "qwen", "messages", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)

LISTED = 20
"""Records in the message of an error."""

_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        path: the new file or directory.
        records: how many it holds.
        image_root: the folder that its image paths are relative to; None where it holds the images.
        images: the folder of the images that were taken out of a table.
    """

    path: Path
    records: int
    image_root: Path | None
    images: Path | None


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        source: what is converted.
        target: what is made of it.
        images: where the images of a table go.
        root: the folder that written paths are relative to.
        names: the new file name of each image that was in a table, by identity.
    """

    source: Source
    target: Path
    images: Path
    root: Root
    names: dict[str, str]

    def name(self, image: DataImage) -> str:
        """What a record calls an image: as it was written, or where it goes."""
        if isinstance(image, HeldImage):
            return self.names[image.identity]
        if self.names and isinstance(image, FileImage):
            return os.path.relpath(image.path, self.root.path)
        return image.name


def convert(
    source: Source,
    target: str | Path,
    to: Format,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the records of a file in another format.

    Args:
        source: the records; all must be without errors. Images are not opened, except to put them into a table or
            take them out of one.
        target: the new file; for `hf` a `.parquet` file or else a directory, as `save_to_disk` makes it.
        to: the format. Image paths stay as they are, relative to the same folder; images of a table are written
            into a folder beside the new file.
        progress: called with the number of records checked and of all.

    Raises:
        DataError: records have errors, or the format cannot hold them; lists them. Nothing is written.
        DiskError: the file cannot be written.
    """
    path = Path(target)
    if path.exists() and (path.is_dir() or path.samefile(source.path)):
        raise DataError(f"{path} is there already. Give another name for the new file.")
    if source.broken is not None:
        line, broken = source.broken
        raise BadDataError([broken], f"{source.path}:{line}")
    job = _job(source, path, to)
    _check(job, to, progress)
    if to == "hf":
        from peft_mllm.data.hub_writing import write_table

        write_table(path, lambda: (_record(job, number) for number in range(len(source))))
    else:
        with disk_errors(path, "the records"):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write_images(job)
        atomic_write_pieces(path, _pieces(job, to), what="the records")
    return Converted(
        path=path,
        records=len(source),
        image_root=None if to == "hf" else job.root.path,
        images=job.images if job.names and to != "hf" else None,
    )


def _job(source: Source, target: Path, to: Format) -> Job:
    """Where images lie, as far as the source's names do not say it."""
    source.keep_addresses()
    beside = Path(os.path.realpath(target.parent))
    images = target.with_name(f"{target.stem}_images")
    names = {} if to == "hf" else dict(_new_names(source, images.name))
    root = Root(beside if names else source.image_root, {}, addresses=True)
    return Job(source, target, images, root, names)


def _new_names(source: Source, folder: str) -> Iterator[tuple[str, str]]:
    """A file name for each image of a table, by its content: equal images become one file."""
    for number in range(len(source)):
        for image in source.parse(number).images:
            if isinstance(image, HeldImage):
                data = image.read()
                suffix = next((suffix for magic, suffix in _SUFFIXES.items() if data.startswith(magic)), ".img")
                yield image.identity, f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}{suffix}"


def _check(job: Job, to: Format, progress: Callable[[int, int], None] | None) -> None:
    """Write and read back every record in memory."""
    wrong: list[str] = []
    for number in range(len(job.source)):
        wrong += [f"{job.source.path}:{job.source.line(number)}: {why}" for why in _faults(job, number, to)]
        if progress is not None:
            progress(number + 1, len(job.source))
    if wrong:
        more = [f"and {len(wrong) - LISTED:,} more"] if len(wrong) > LISTED else []
        raise DataError("\n".join(["Nothing was written.", *wrong[:LISTED], *more]))


def _faults(job: Job, number: int, to: Format) -> list[str]:
    parsed = job.source.parse(number)
    errors = [f"{each.code}: {each}" for each in parsed.problems if each.severity == "error"]
    if parsed.record is None or errors:
        return errors
    try:
        why = _unheld(job, parsed.record, to)
    except BadDataError as error:
        return [str(error)]
    return [] if why is None else [str(problem("format-cannot-hold", format=to, why=why))]


def _unheld(job: Job, record: Record, to: Format) -> str | None:
    """What a format cannot hold of a record, or None."""
    if why := _known_limit(job, record, to):
        return why
    if to == "hf":
        from peft_mllm.data.hub_writing import read_back

        return _difference(job, record, read_back(record, job.root), to)
    try:
        written = json.dumps(_object(job, record, to), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        return f"a value of its other keys is not JSON ({error})"
    return _difference(job, record, parse(written, source=record.source, default_id="", root=job.root), to)


def _known_limit(job: Job, record: Record, to: Format) -> str | None:
    """The limits of formats that can be told before trying."""
    if to in ("llava", "qwen") and record.turns[0].role == "system":
        return "a system turn: both models' own code sets the system text itself (messages and hf keep it)"
    if to == "qwen":
        long = [name for name in map(job.name, _images(record)) if len(name.encode()) > MAX_PATH_BYTES]
        return f"a path of more than {MAX_PATH_BYTES} bytes ({shown(long[0])})" if long else None
    if to == "hf" and (remote := [image for image in _images(record) if isinstance(image, RemoteImage)]):
        return f"an image that is only an address ({shown(remote[0].name)}); download it"
    return None


def _difference(job: Job, record: Record, back: Parsed, to: Format) -> str | None:
    """In what a record differs that was written and read again."""
    if back.record is None:
        first = next(each for each in back.problems if each.severity == "error")
        return f"it would be read as an error ({first.reason})"
    if back.record.turns != record.turns:
        return "its text would be read differently"
    before, after = ([_where(job, image, to) for image in _images(each)] for each in (record, back.record))
    if before != after:
        return "its images would be others"
    if back.record.id != record.id:
        return "its id would be read differently"
    if _canonical(back.record.meta) != _canonical(record.meta):
        return "its other keys would be read differently"
    return None


def _where(job: Job, image: DataImage, to: Format) -> str:
    """What tells an image before and after: its content in a table, else its file."""
    if to == "hf":
        return image.key
    return (
        os.path.realpath(job.root.path / job.names[image.identity]) if isinstance(image, HeldImage) else image.identity
    )


def _canonical(meta: Mapping[str, Any]) -> str:
    return json.dumps(dict(meta), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _images(record: Record) -> Sequence[DataImage]:
    return [image for image in record.images if isinstance(image, DataImage)]


# --- writing ---


def _pieces(job: Job, to: Format) -> Iterator[bytes]:
    """The file: JSON lines of messages, or a list with a record on each line."""
    lines = (
        json.dumps(_object(job, _record(job, number), to), ensure_ascii=False, allow_nan=False).encode()
        for number in range(len(job.source))
    )
    if to == "messages":
        yield from (line + b"\n" for line in lines)
        return
    yield b"[\n"
    for count, line in enumerate(lines):
        yield (b",\n" if count else b"") + line
    yield b"\n]\n"


def _record(job: Job, number: int) -> Record:
    return job.source[number]


def _object(job: Job, record: Record, to: Format) -> dict[str, Any]:
    """A record as a JSON object."""
    names = [job.name(image) for image in _images(record)]
    if to == "messages":
        messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
        return {"id": record.id, "messages": messages, **({"images": names} if names else {}), **record.meta}
    if to == "llava":
        image = {"image": names[0] if len(names) == 1 else names} if names else {}
        roles = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": roles[turn.role], "value": turn.text} for turn in record.turns]
        return {"id": record.id, **image, "conversations": turns, **record.meta}
    meta = dict(record.meta)
    as_written = meta.get(CAPTIONS) == AS_WRITTEN
    if as_written:
        del meta[CAPTIONS]
    texts = iter(pack([t.text for t in record.turns if t.role == "user"], names, as_written=as_written))
    turns = [{"from": t.role, "value": next(texts) if t.role == "user" else t.text} for t in record.turns]
    return {"id": record.id, "conversations": turns, **meta}


def _write_images(job: Job) -> None:
    """The images of a table, as the files they were; those that are there, by their content, are not written again."""
    if not job.names:
        return
    with disk_errors(job.images, "the images"):
        job.images.mkdir(parents=True, exist_ok=True)
    for number in range(len(job.source)):
        for image in job.source.parse(number).images:
            if isinstance(image, HeldImage) and not (file := job.root.path / job.names[image.identity]).exists():
                atomic_write(file, image.read(), what="the image")
