"""One writer per directory: the kernel's lock on one machine, a lease that is renewed between machines.

On one machine `flock` decides at once, and the kernel lets go when the holder dies: a file left by a dead process
is no obstacle. Not every network file system carries `flock` to other machines, so the file is a lease besides. It
says who holds it, and its holder touches it every ten seconds; whoever finds another machine's lease that was
touched within the last minute is refused. Both times are the file system's: that of a file just written beside the
lock is the present, so no two clocks are compared.

An expired lease is taken over. The old holder may live on, after a SIGSTOP or a laptop's sleep: before every write
it compares the text in the file, finds another's name there, and stops. After its own lease ran out it renews it,
and waits a moment before it compares, since somebody may be about to write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import threading
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from peft_mllm.errors import UserError
from peft_mllm.files import canonical_json, disk_errors, read_json, temporary_name

LOCK = "lock"
LEASE = 60.0
"""Seconds after its last renewal until another machine may take a lease over."""
RENEW = 10.0
"""Seconds between renewals: five may fail before the lease runs out."""
SETTLE = 1.0
"""Seconds between taking a contested lease and believing it: a rival who saw the same has written by then."""
SIZE = 512
"""Bytes of the file, padded: one write replaces the text whole, and no reader finds it cut."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a machine sleeps, where there is one
_NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class InUse(UserError):  # noqa: N818 - says how things stand, like `Interrupted`
    """Another process writes the directory.

    Attributes:
        seconds: until its lease runs out, if it is not renewed; None where the kernel knows that the holder lives.
    """

    def __init__(self, message: str, seconds: float | None = None):
        super().__init__(message)
        self.seconds = seconds


class Lock:
    """A lock that is held from `acquire` to `release`, by the process that acquired it and no child of it."""

    def __init__(self, path: Path, descriptor: int, holder: dict[str, Any]):
        self._path = path
        self._descriptor: int | None = descriptor
        self._holder, self._text = holder, _text_of(holder)
        self._renewed = _now()
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {path}", daemon=True)
        _held.add(self)
        self._thread.start()

    @classmethod
    def acquire(cls, path: Path) -> Self:
        """Take the lock or refuse at once.

        Raises:
            InUse: another process has it; names its host and process id, and when its lease runs out.
            DiskError: the file cannot be written.
        """
        holder = _myself()
        with disk_errors(path, "the lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                by_kernel = _flock(descriptor, path)
                contested = _refuse_a_live_lease(descriptor, path, by_kernel)
                _write(descriptor, _text_of(holder))
                if contested:
                    time.sleep(SETTLE)
                    if path.read_bytes() != _text_of(holder):
                        raise InUse(_refusal(path))
            except BaseException:
                os.close(descriptor)
                raise
        return cls(path, descriptor, holder)

    def check(self) -> None:
        """Make sure, right before a write, that this process is still the one writer.

        Raises:
            UserError: the lock was released, or the file is gone or names another process.
        """
        if self._descriptor is None:
            raise UserError(f"{self._path.parent} is not open for writing in this process.")
        with self._mutex:
            try:
                if _now() - self._renewed > LEASE:
                    self._renew()
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
        if self._descriptor is None:
            return
        self._end.set()
        self._thread.join()
        with suppress(OSError):  # an unmarked lease runs out by itself
            if self._path.read_bytes() == self._text:
                _write(self._descriptor, _text_of({**self._holder, "released": True}))
        self.forget()

    def forget(self) -> None:
        """Let go of the kernel's lock and nothing else, as a forked child must."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _keep(self) -> None:
        """Renew the lease until it is released or lost; the thread's work."""
        while not self._end.wait(RENEW):
            with self._mutex, suppress(OSError):  # a network that is away for a moment comes back
                if self._path.read_bytes() != self._text:
                    return  # `check` says so where it matters
                self._renew()

    def _renew(self) -> None:
        """Touch the file; after a lapse, wait until a rival who saw it expired has written."""
        assert self._descriptor is not None, "renewed while it is held"
        lapsed = _now() - self._renewed > LEASE
        os.utime(self._descriptor)  # to the file system's present, not to ours
        self._renewed = _now()
        if lapsed:
            self._end.wait(SETTLE)


def recorded_holder(path: Path) -> dict[str, Any] | None:
    """Who last wrote the lock file: `host`, `pid`, `boot_id`, `since`, `released`. None if it is no file of ours."""
    try:
        holder = read_json(path)
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else None


def _myself() -> dict[str, Any]:
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    # the token tells two leases of one process apart
    me = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id, "since": since}
    return {**me, "token": secrets.token_hex(8), "released": False}


def _text_of(holder: dict[str, Any]) -> bytes:
    return canonical_json(holder).ljust(SIZE - 1) + b"\n"


def _write(descriptor: int, text: bytes) -> None:
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)  # on a network file system, others see it from here on


def _flock(descriptor: int, path: Path) -> bool:
    """Take the kernel's lock; False where the file system has none, and the lease alone must do."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUse(_refusal(path)) from error
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _refuse_a_live_lease(descriptor: int, path: Path, by_kernel: bool) -> bool:
    """Whether an expired lease that the kernel knows nothing of is to be taken over; raises if it has not expired."""
    holder = recorded_holder(path)
    if holder is None or holder.get("released") or (by_kernel and _is_of_this_machine(holder)):
        return False
    renewed = os.fstat(descriptor).st_mtime
    left = renewed + LEASE - _time_of_disk(path)
    if left > 0:
        raise InUse(_refusal(path, left, renewed + LEASE), left)
    return True


def _is_of_this_machine(holder: dict[str, Any]) -> bool:
    """Whether the kernel that was asked for its lock is the one that the holder runs on."""
    me, theirs = _myself(), holder.get("boot_id")
    return bool(theirs == me["boot_id"] if theirs and me["boot_id"] else holder["host"] == me["host"])


def _time_of_disk(path: Path) -> float:
    """The file system's present, in seconds: the time that it gives a file written just now."""
    probe = temporary_name(path)
    try:
        with probe.open("xb") as file:
            file.write(b".")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _refusal(path: Path, left: float | None = None, until: float = 0.0) -> str:
    used = f"{path.parent} is in use by {_in_words(recorded_holder(path))}"
    if left is None:
        return f"{used}. A run has one writer: wait for it, stop it, or choose another output_dir."
    end = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds")
    return (
        f"{used}. Its lease runs out in {left:.0f} s (at {end} by the disk's clock), and is renewed while it lives. "
        "A run has one writer: wait for it, stop it, or choose another output_dir."
    )


def _in_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on host {holder['host']} (since {holder.get('since', 'unknown')})"


def _now() -> float:
    return time.clock_gettime(_CLOCK)


# A forked child (a data loader's worker) inherits the descriptor, and would hold the lock after a kill of its
# parent. Closing the child's copy leaves the parent's lock in place, and the parent's thread renews its lease.
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
