"""What a study runs, and what can run it: a job, how it ended, and the contract of an engine.

An engine holds no truth. It starts a job, says that it ended, and forgets it; whether a run is done is in its
directory, and how often it failed in the study's attempts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from peft_mllm.errors import EXIT_INTERNAL, UserError

WORK = "peft_mllm.study.engine.work:train"
"""What an engine does with a job's spec: `module:function`, imported where the job runs."""


class EngineError(UserError):
    """Nothing can be run at all: the fault is with the machines, not with a run."""

    exit_code = EXIT_INTERNAL


@dataclass(frozen=True)
class Job:
    """One run to be done.

    Attributes:
        id: of its spec.
        title: what the live view calls it.
        directory: of the run.
        spec: as JSON data; its output_dir is `directory`.
        members: the jobs that this one does together in one process, if it is a bundle of several.
    """

    id: str
    title: str
    directory: Path
    spec: Mapping[str, Any]
    members: tuple[Job, ...] = ()

    @property
    def log(self) -> Path:
        """What the run says goes here, beside its directory; a further attempt is appended."""
        return self.directory.with_name(f"{self.directory.name}.log")


@dataclass(frozen=True)
class Ending:
    """How an attempt at a job ended.

    Attributes:
        code: the exit code; minus the number of the signal that ended it; None where the machine or the process that
            watched it was lost, and nobody knows.
        message: what it said, or the end of its log.
        in_use: another process holds the run's directory, so nothing was tried.
        wait: seconds until that process's lease runs out, where that is known.
        host: where it ran, if that is known.
        bundle: the id of the job whose member it was, if it was one.
    """

    id: str
    code: int | None
    message: str = ""
    in_use: bool = False
    wait: float | None = None
    host: str = ""
    bundle: str = ""


class Engine(ABC):
    """Runs jobs, several at a time, each in a process of its own."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many jobs it can run at once; may change while it works."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In words: `2 processes on this machine`."""

    @abstractmethod
    def start(self, job: Job) -> None:
        """Begin a job; at most `slots` are under way."""

    @abstractmethod
    def endings(self, seconds: float) -> Sequence[Ending]:
        """The jobs that ended since the last call; waits for one so long at most.

        Raises:
            EngineError: nothing can be run.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask all jobs under way to save and end; their endings follow."""

    @abstractmethod
    def close(self) -> None:
        """End what is left, without asking; nothing of it survives."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
