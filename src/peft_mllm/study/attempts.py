"""How often each run of a study failed, and why: one file of lines per run, only ever added to.

A failure counts; what was lost with its machine, or killed from outside, counts only where the run stood still: from
the second loss at the same point on it is a failure like any other, so a run that takes its machine down does not do
so for ever. After so many failures, or at once where the next would be the same, the run is set aside. The file is all
that is known of it: another driver, or the next, reads the same.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peft_mllm.errors import EXIT_BAD_DATA, EXIT_DIVERGED, EXIT_USAGE, DataError
from peft_mllm.files import append_lines, disk_errors, read_lines

State = Literal["failed", "set aside", "lost", "forgiven"]

ATTEMPTS_FOLDER = "attempts"
"""Of a study, with the attempts at its runs."""
MOST_ATTEMPTS = 3
HOPELESS = frozenset({EXIT_USAGE, EXIT_BAD_DATA, EXIT_DIVERGED})
"""Exit codes of what would happen again in the same way: nothing but the spec or the data can change it."""


@dataclass(frozen=True)
class Attempt:
    """One line.

    Attributes:
        time: UTC, ISO 8601.
        host: where the run was, if known, else where the driver was.
        exit_code: minus a signal's number; None where nobody knows.
        cause: in words.
        state: what it means: "forgiven" is no attempt, it begins the count anew.
        progress: how far the run was (`progress_of`).
    """

    time: str
    host: str
    exit_code: int | None
    cause: str
    state: State
    progress: str = ""


class Attempts:
    """The attempts at the runs of one study.

    Args:
        folder: has a file for each run that ever failed; made when the first does.
        most: failures after which a run is set aside.
    """

    def __init__(self, folder: Path, *, most: int = MOST_ATTEMPTS) -> None:
        self._folder, self._most = folder, most

    def of(self, run: str) -> list[Attempt]:
        """What happened to a run since it was last forgiven, oldest first.

        Raises:
            DataError: the file was changed by others and cannot be read.
        """
        file = self._folder / f"{run}.jsonl"
        try:
            lines = [_attempt(line) for line in read_lines(file)]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{file}: not what was written ({error}). Delete it; the run is then tried again."
            ) from error
        forgiven = [number for number, each in enumerate(lines) if each.state == "forgiven"]
        return lines[forgiven[-1] + 1 :] if forgiven else lines

    def failures(self, run: str) -> int:
        """How many attempts count."""
        return sum(each.state in ("failed", "set aside") for each in self.of(run))

    def set_aside(self, run: str) -> str | None:
        """Why a run is not tried again; None if it is."""
        last = self.of(run)[-1:]
        return last[0].cause if last and last[0].state == "set aside" else None

    def failed(self, run: str, code: int | None, cause: str, *, host: str = "") -> State:
        """Record a failure; says whether the run is set aside by it."""
        final = code in HOPELESS or self.failures(run) + 1 >= self._most
        return self._record(run, code, cause, "set aside" if final else "failed", host=host)

    def lost(self, run: str, code: int | None, cause: str, *, progress: str, host: str = "") -> State:
        """Record that a run was lost with its machine or killed; a failure if it was lost at this point before."""
        before = [each.progress for each in self.of(run) if each.progress]
        if progress not in before[-1:]:
            return self._record(run, code, cause, "lost", host=host, progress=progress)
        final = self.failures(run) + 1 >= self._most
        return self._record(run, code, cause, "set aside" if final else "failed", host=host, progress=progress)

    def forgive(self, run: str) -> None:
        """Begin the count anew."""
        self._record(run, None, "", "forgiven")

    def _record(
        self, run: str, code: int | None, cause: str, state: State, *, host: str = "", progress: str = ""
    ) -> State:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = Attempt(now, host or socket.gethostname(), code, cause, state, progress)
        with disk_errors(self._folder, "the attempts"):
            self._folder.mkdir(parents=True, exist_ok=True)
        append_lines(self._folder / f"{run}.jsonl", [asdict(line)], what="the attempts")
        return state


def progress_of(directory: Path) -> str:
    """How far a run is, as its directory shows it: what a lost attempt must have moved to be no failure."""
    steps = sorted(path.name for path in (directory / "checkpoints").glob("step-*"))
    answers = sum(_size(path) for path in (directory / "predictions").rglob("*.jsonl"))
    return f"{steps[-1] if steps else 'no checkpoint'}, {answers} bytes of answers"


def last_of(attempts: Sequence[Attempt]) -> str:
    """The cause of the last attempt, in one line."""
    return " ".join(attempts[-1].cause.split()) if attempts else ""


def _attempt(line: dict[str, Any]) -> Attempt:
    return Attempt(**line)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed by the run in this moment
        return 0
