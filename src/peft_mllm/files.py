"""Single files: whoever reads one finds the old content or the new, never a part of it.

Every write that fails for the disk's sake is a `DiskError` that names the path, and leaves no temporary file.
JSON is the only format: it runs no code when it is read. It has no NaN, so a float that is not finite is
written as the string "NaN", "Infinity" or "-Infinity": a log must show the true value, and stay readable.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft_mllm.errors import DiskError

TEMPORARY = ".tmp-"
"""Begins the name of everything that is not finished; what is found with it was left by a killed writer."""

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_REMEDY = {
    errno.ENOSPC: "Free some space; the same command then goes on from the last checkpoint.",
    errno.EDQUOT: "Free some of your quota; the same command then goes on from the last checkpoint.",
    errno.EROFS: "The disk is mounted read-only: choose another directory.",
    errno.EACCES: "Choose a directory that you may write to.",
    errno.EPERM: "Choose a directory that you may write to.",
    errno.EIO: "The disk reports a defect: check it, or choose a directory on another one.",
}
# How Rust prints an operating-system error; safetensors reports a full disk so, and not as an OSError.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def temporary_name(path: Path) -> Path:
    """A free name beside `path`, on the same file system, for what will become `path`."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def atomic_write(path: Path, data: bytes | str, *, what: str = "the file") -> None:
    """Replace `path` by `data`: durable when this returns, untouched when it raises.

    Raises:
        DiskError: the file could not be written; names it, and the free and needed bytes on a full disk.
    """
    content = data.encode() if isinstance(data, str) else data
    atomic_write_pieces(path, [content], what=what, needed=len(content))


def atomic_write_pieces(
    path: Path, pieces: Iterable[bytes], *, what: str = "the file", needed: int | None = None
) -> None:
    """Likewise of a file of any size, written piece by piece.

    Raises:
        DiskError: as `atomic_write`; `needed` is the number of bytes, where that is known.
    """
    temporary = temporary_name(path)
    with disk_errors(path, what, needed=needed):
        try:
            with temporary.open("xb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, *, what: str = "the directory", needed: int | None = None) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when the block ends; when it raises, nothing is left of it.

    Parents are made; an empty directory that is there is replaced.

    Raises:
        DiskError: it could not be written; `needed` is the number of bytes, where that is known.
    """
    temporary, made = temporary_name(path), [parent for parent in path.parents if not parent.exists()]
    with disk_errors(path, what, needed=needed):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            mode = 0o666 & ~_umask()
            for each in [*temporary.rglob("*"), temporary]:
                if each.is_dir():
                    sync_directory(each)
                else:
                    each.chmod(mode)  # safetensors writes for the owner only
                    sync_file(each)
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:  # the innermost first
                with suppress(OSError):
                    parent.rmdir()
            raise


def _umask() -> int:
    """What the process takes from the permissions of new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any, *, what: str = "the file") -> None:
    """Write `value` for people and programs: indented, keys in the order given."""
    atomic_write(path, _indented(value), what=what)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file is absent or cannot be read.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object that carries the sha256 of its own canonical form, as `read_sealed` expects it."""
    return _indented({**value, "sha256": json_digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read an object written as `sealed_json`; the seal itself is taken off.

    Raises:
        OSError: the file is absent or cannot be read.
        ValueError: it is not JSON, or its content is not what was sealed.
    """
    value = read_json(path)
    if not isinstance(value, dict) or "sha256" not in value:
        raise ValueError("has no sha256 of its own")
    seal = value.pop("sha256")
    if seal != json_digest(value):
        raise ValueError("its content does not match its sha256")
    return value


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. Equal values give equal bytes."""
    return _utf8(json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def json_digest(value: Any) -> str:
    """The sha256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line of JSON; it survives a kill of this process (a power loss only after `sync_file`)."""
    line = _line(value)
    with disk_errors(path, "a line of", needed=len(line)), path.open("a+b") as file:
        _cut_torn_line(path, file.fileno())
        file.write(line)


def append_lines(path: Path, values: Iterable[Mapping[str, Any]], *, what: str = "the file") -> None:
    """Append lines of JSON in one write; they are on the disk when this returns."""
    content, new = b"".join(map(_line, values)), not path.exists()
    with disk_errors(path, what, needed=len(content)):
        with path.open("a+b") as file:
            _cut_torn_line(path, file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_directory(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if it is absent. A last line without an end is no line.

    Raises:
        ValueError: a whole line is not JSON; names the file and the line.
    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON ({error})") from error
    return values


def write_lines(path: Path, values: Iterable[Mapping[str, Any]], *, what: str = "the file") -> None:
    """Replace a file of JSON lines."""
    atomic_write(path, b"".join(map(_line, values)), what=what)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk: without it, a power loss can undo a rename."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # Some network and user-space file systems cannot sync a directory, and say so with these two.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextmanager
def disk_errors(path: Path, what: str, *, needed: int | None = None) -> Iterator[None]:
    """Turn an operating-system error into a `DiskError` that says what could not be written, and where.

    Args:
        path: what was to be written.
        what: it in words, e.g. "the log": the message begins "Cannot write the log /path".
        needed: how many bytes it takes, where that is known.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise DiskError(_disk_message(path, what, number, needed)) from error


def size_in_words(size: int) -> str:
    """Bytes as a person reads them: `1.5 GB`."""
    number, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} bytes" if units[0] == "bytes" else f"{number:.1f} {units[0]}"


def _disk_message(path: Path, what: str, number: int, needed: int | None) -> str:
    sentences = [f"Cannot write {what} {path}: {os.strerror(number)}."]
    if number in _NO_SPACE:
        need = "" if needed is None else f"Needed: about {size_in_words(needed)}. "
        sentences.append(f"{need}Free: {_free(path)}.")
    sentences.append(_REMEDY.get(number, "Nothing that was written before is lost."))
    return " ".join(sentences)


def _free(path: Path) -> str:
    for directory in path.absolute().parents:
        with suppress(OSError):
            return size_in_words(shutil.disk_usage(directory).free)
    return "unknown"


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERRNO.search(str(error))
    return int(found[1]) if found else None


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: keys are strings, floats finite or spelled."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _indented(value: Any) -> bytes:
    return _utf8(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _line(value: Mapping[str, Any]) -> bytes:
    return _utf8(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n")


def _utf8(text: str) -> bytes:
    # Half a surrogate pair has no UTF-8 form; backslashreplace gives `\ud800`, which is its JSON escape.
    return text.encode("utf-8", "backslashreplace")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path, descriptor: int) -> None:
    """Drop what a killed writer left of a last line, so that the next one does not stick to it."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
