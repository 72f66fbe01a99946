"""Whole directories that are there or not there: written aside, sealed by a manifest, renamed into place.

What a kill leaves behind has a name of its own (`.tmp-`, `.trash-`) and is never mistaken for a directory
that was committed; what a disk does to it later, `verify` finds by the sha256 of every file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_mllm.files import (
    TEMPORARY,
    disk_errors,
    file_digest,
    read_sealed,
    sealed_json,
    sync_directory,
    sync_file,
    temporary_name,
)

MANIFEST = "MANIFEST.json"
TRASH = ".trash-"
"""Begins the name of a directory that is being removed."""


def commit_directory(
    target: Path,
    write: Callable[[Path], None],
    *,
    manifest: Mapping[str, Any],
    what: str = "the directory",
    needed: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Let `write` fill a directory, and put it at `target` in one step; one that was there is replaced.

    Args:
        target: where it goes; the parent must exist.
        write: fills the directory that it is given.
        manifest: what the manifest says beside `files`.
        what: the directory in words, for messages.
        needed: how many bytes it will take, where that is known.
        check: called right before the directory appears; raises if it must not.

    Raises:
        DiskError: it could not be written. Nothing is left of it, and what was at `target` still is.
    """
    temporary = temporary_name(target)
    with disk_errors(target, what, needed=needed):
        try:
            temporary.mkdir()
            write(temporary)
            _seal(temporary, manifest)
            check()
            if target.exists():
                remove_directory(target)
            temporary.rename(target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that, at any moment, it is there whole or not at all."""
    trash = path.with_name(temporary_name(path).name.replace(TEMPORARY, TRASH, 1))
    with disk_errors(path, "to"):
        path.rename(trash)
        sync_directory(path.parent)
        shutil.rmtree(trash)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed writer left in a directory; only its one living writer may call this."""
    for path in directory.iterdir():
        if path.name.startswith((TEMPORARY, TRASH)):
            with disk_errors(path, "to"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_manifest(directory: Path) -> dict[str, Any]:
    """What was said when the directory was committed.

    Raises:
        OSError: there is no manifest, or it cannot be read.
        ValueError: it is not what was written.
    """
    return read_sealed(directory / MANIFEST)


def verify(directory: Path) -> list[str]:
    """Why a committed directory cannot be trusted; empty if it can."""
    try:
        listed = read_manifest(directory)["files"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} {_reason(error)}"]
    doubts = [f"{name} {doubt}" for name in listed if (doubt := _doubt(directory / name, listed[name]))]
    extra = set(_files(directory)) - {MANIFEST} - set(listed)
    return doubts + [f"{name} is not in the manifest" for name in sorted(extra)]


def directory_size(directory: Path) -> int:
    """Bytes of all files in it."""
    return sum((directory / name).stat().st_size for name in _files(directory))


def _seal(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, and wait until all is on the disk."""
    files = {name: _entry(directory / name) for name in _files(directory)}
    (directory / MANIFEST).write_bytes(sealed_json({**manifest, "files": files}))
    for name in _files(directory):
        sync_file(directory / name)
    for folder in {(directory / name).parent for name in files} | {directory}:
        sync_directory(folder)


def _files(directory: Path) -> Iterator[str]:
    """The files below a directory as a manifest names them, in a fixed order."""
    for path in sorted(directory.rglob("*")):
        if not path.is_dir():
            yield path.relative_to(directory).as_posix()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _doubt(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes, not {entry['size']}"
        return None if file_digest(path) == entry["sha256"] else "has another sha256 than was written"
    except OSError as error:
        return _reason(error)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
