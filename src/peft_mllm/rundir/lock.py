"""One writer per directory: an advisory lock that the system itself releases when its holder dies.

The lock is the kernel's (`flock`), so a file left by a dead process is no obstacle. The text in the file says
who holds it, and is compared again before every write: on a network file system that lost the lock, or after
somebody deleted the file by force, the old writer finds another's name there and stops.
"""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from peft_mllm.errors import UserError
from peft_mllm.files import canonical_json, disk_errors, read_json

LOCK = "lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """A lock that is held from `acquire` to `release`, by the process that acquired it and no child of it."""

    def __init__(self, path: Path, descriptor: int, text: bytes):
        self._path = path
        self._descriptor: int | None = descriptor
        self._text = text
        _held.add(self)

    @classmethod
    def acquire(cls, path: Path) -> Self:
        """Take the lock or refuse at once.

        Raises:
            UserError: another process has it; names its host and process id.
            DiskError: the file cannot be written.
        """
        text = canonical_json(_myself())
        with disk_errors(path, "the lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text, 0)
            except BlockingIOError as error:
                os.close(descriptor)
                raise UserError(_refusal(path)) from error
            except OSError:
                os.close(descriptor)
                raise
        return cls(path, descriptor, text)

    def check(self) -> None:
        """Make sure, right before a write, that this process is still the one writer.

        Raises:
            UserError: the lock was released, or the file is gone or names another process.
        """
        if self._descriptor is None:
            raise UserError(f"{self._path.parent} is not open for writing in this process.")
        try:
            found = self._path.read_bytes()
        except OSError:
            found = b""
        if found != self._text:
            raise UserError(
                f"{self._path.parent} was taken over by {_in_words(recorded_holder(self._path))}: "
                f"this process (process {os.getpid()}) writes nothing more into it."
            )

    def release(self) -> None:
        """Let the next writer in; the file stays, since deleting it would let two in at once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def recorded_holder(path: Path) -> dict[str, Any] | None:
    """Who last wrote the lock file: `host`, `pid`, `boot_id`, `since`. None if it is not a file of ours."""
    try:
        holder = read_json(path)
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else None


def _myself() -> dict[str, Any]:
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id, "since": since}


def _refusal(path: Path) -> str:
    return (
        f"{path.parent} is in use by {_in_words(recorded_holder(path))}. "
        "A run has one writer: wait for it, stop it, or choose another output_dir."
    )


def _in_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on host {holder['host']} (since {holder.get('since', 'unknown')})"


# A forked child (a data loader's worker) inherits the descriptor, and would hold the lock after a kill of its
# parent. Closing the child's copy leaves the parent's lock in place.
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
