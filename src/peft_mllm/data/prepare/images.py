"""Bringing a split's images into the prepared folder: written whole, decoded once, entered in a journal.

The journal, `images_{split}.jsonl`, has a line for each image that is there and good. Work that was killed goes on
after its last line; the same lines tell a task, later, what an image's content must be.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_mllm.data.images import inspect
from peft_mllm.data.prepare.source import Content
from peft_mllm.errors import Interrupted
from peft_mllm.files import TEMPORARY, append_line, disk_errors, read_lines

GO_ON = "Stopped while preparing: the same command goes on from there."


@dataclass(frozen=True)
class Placed:
    """An image that is there."""

    bytes: int
    sha256: str
    warnings: tuple[str, ...] = ()


@dataclass
class Brought:
    """What became of a split's images.

    Attributes:
        placed: the good ones, by name.
        failed: why the others are not there.
    """

    placed: dict[str, Placed] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def warnings(self) -> Counter[str]:
        """What is odd about the good ones, by code of `data check`."""
        return Counter(code for each in self.placed.values() for code in each.warnings)


class Carrier:
    """Writes images into one split's folder.

    Args:
        folder: of the prepared data set.
        official: the split's folder in it.
    """

    def __init__(self, folder: Path, official: str):
        self.folder, self.official = folder / official, official
        self.journal = journal_of(folder, official)

    def entered(self) -> dict[str, Placed]:
        """What the journal has, of this and earlier calls."""
        return {
            line["name"]: Placed(line["bytes"], line["sha256"], tuple(line.get("warnings", ())))
            for line in read_lines(self.journal)
        }

    def placed(self) -> dict[str, Placed]:
        """Of that, what is still there."""
        there = {}
        for name, placed in self.entered().items():
            with suppress(OSError):
                if (self.folder / name).stat().st_size == placed.bytes:
                    there[name] = placed
        return there

    def clean(self) -> None:
        """Remove what a killed writer left half-written."""
        for path in self.folder.rglob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)

    def bring(
        self,
        contents: Iterator[tuple[str, Content]],
        *,
        brought: Brought,
        advance: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> None:
        """Write and check images, several at once; the order of the journal is that of completion.

        Raises:
            Interrupted: somebody asked to stop; what was entered stays.
            DiskError: an image could not be written.
        """
        workers = min(8, os.cpu_count() or 1)
        pending: deque[tuple[str, Future[Placed | str]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for name, content in contents:
                    if stop():
                        raise Interrupted(GO_ON)
                    pending.append((name, pool.submit(self._place, name, content)))
                    while len(pending) > 4 * workers:
                        self._enter(*pending.popleft(), brought)
                        advance(1)
            finally:
                while pending:
                    self._enter(*pending.popleft(), brought)
                    advance(1)

    def _enter(self, name: str, future: Future[Placed | str], brought: Brought) -> None:
        done = future.result()
        if isinstance(done, str):
            brought.failed[name] = done
            return
        brought.placed[name] = done
        line: dict[str, Any] = {"name": name, "bytes": done.bytes, "sha256": done.sha256}
        append_line(self.journal, line | ({"warnings": list(done.warnings)} if done.warnings else {}))

    def _place(self, name: str, content: Content) -> Placed | str:
        """Write one image and look at it; or say what is wrong."""
        if isinstance(content, str):
            return content
        target = self.folder / name
        # the name's end stays, since a look compares it with the content
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{target.name}")
        with disk_errors(target, "the image"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(temporary, content)
                seen = inspect(temporary, name=name)
                errors = [each for each in seen.problems if each.severity == "error"]
                if errors:
                    return errors[0].reason
                size = temporary.stat().st_size
                temporary.replace(target)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        return Placed(size, seen.digest, tuple(each.code for each in seen.problems))


def journal_of(folder: Path, official: str) -> Path:
    """The journal of a split's images."""
    return folder / f"images_{official}.jsonl"


def seals(folder: Path, official: str) -> Mapping[str, str]:
    """The sha256 of each image of a prepared split, by name."""
    return {line["name"]: line["sha256"] for line in read_lines(journal_of(folder, official))}


def _write(path: Path, content: bytes | Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    try:  # a second name costs no space; loading compares content with what was checked
        os.link(os.path.realpath(content), path)
    except OSError:
        shutil.copyfile(content, path)
