"""A directory of sealed files under digests: shared by processes, bounded in size, the least recently used goes first.

A file is its content and the sha256 of digest and content. It appears by a rename, so a reader finds all of it or
nothing; nothing waits for the disk, since a file that a power loss tore does not fit its seal and is made again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from peft_mllm.files import TEMPORARY, size_in_words, temporary_name

SEAL = hashlib.sha256().digest_size
SUFFIX = ".features"
ROOM = 20
"""A writer counts the directory anew after each 1/20 of its limit, since others write there, too."""
SWEPT = 0.9
"""To which share of the limit old files are removed once there is too much."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file is taken for one that a killed writer left."""


class Store:
    """Contents by digest.

    Args:
        directory: made when the first file is written.
        limit: bytes that the files may take together; each writer may exceed it by a twentieth for a moment.
        note: told once when the disk does not take any more; what is asked for is then computed each time.
    """

    def __init__(self, directory: str | Path, *, limit: int, note: Callable[[str], None] = lambda text: None):
        self.directory = Path(directory).expanduser()
        self.limit = limit
        self.damaged = 0
        """Files that did not fit their seal, and were removed."""
        self._note = note
        self._writes = True
        self._uncounted: int | None = None  # bytes written since the directory was counted; None is never

    def read(self, digest: str) -> bytes | None:
        """The content, or None; a file that does not fit its seal is removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) < SEAL or _seal(digest, memoryview(data)[:-SEAL]) != data[-SEAL:]:
            self.damaged += 1
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # a directory that may only be read
            os.utime(path)
        return data[:-SEAL]

    def __contains__(self, digest: str) -> bool:
        """Whether there is a file, whatever is in it."""
        return self._path(digest).exists()

    def write(self, digest: str, content: bytes) -> None:
        """Keep a content; where the disk does not take it, that is said once and the run goes on."""
        size = len(content) + SEAL
        if not self._writes or size > self.limit:
            return
        path = self._path(digest)
        temporary = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with temporary.open("xb") as file:
                file.writelines((content, _seal(digest, content)))
            temporary.replace(path)
        except OSError as error:
            self._writes = False
            self._note(
                f"Vision features cannot be kept in {self.directory}: {os.strerror(error.errno or 0)}, "
                f"with {size_in_words(size)} to write. This run goes on and computes what it does not find."
            )
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.directory / digest[:2] / f"{digest}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, where `size` bytes more would be too much."""
        if self._uncounted is not None and self._uncounted + size <= self.limit // ROOM:
            self._uncounted += size
            return
        self._uncounted = size
        files = sorted(self._files())
        held = sum(length for _, length, _ in files) + size
        if held <= self.limit:
            return
        for _, length, path in files:
            if held <= SWEPT * self.limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            held -= length

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each was last used, its bytes, and its path; what killed writers left is removed on the way."""
        found = []
        for folder in self.directory.glob("??"):
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(OSError):  # another process may have removed it
                        status = entry.stat()
                        if entry.name.endswith(SUFFIX):
                            found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                        elif entry.name.startswith(TEMPORARY) and status.st_mtime < time.time() - ABANDONED:
                            Path(entry.path).unlink(missing_ok=True)
        return found


def _seal(digest: str, content: bytes | memoryview) -> bytes:
    total = hashlib.sha256(digest.encode())
    total.update(content)
    return total.digest()
