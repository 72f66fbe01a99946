"""What happens in a run's own process: one spec is trained and evaluated, its output goes to the run's log."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_mllm.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED, DegradedModel, DiskError, UserError
from peft_mllm.rundir import InUse

Work = Callable[[Mapping[str, Any]], object]
WorkOfSeveral = Callable[[Sequence[Mapping[str, Any]]], Sequence[BaseException | None]]

LONGEST_MESSAGE = 900
"""Characters: with its JSON around it a line stays below 4096 bytes, which a pipe takes whole."""


@dataclass(frozen=True)
class Said:
    """How a run ended, in its own words.

    Attributes:
        code: of the process's exit.
        message: empty where there is nothing to say.
        in_use: another process holds the run.
        wait: seconds until that one's lease runs out, where that is known.
    """

    code: int
    message: str = ""
    in_use: bool = False
    wait: float | None = None


def attempt(work: Work, spec: Mapping[str, Any], *, folder: str) -> Said:
    """Do the work; whatever becomes of it is an exit code and a sentence.

    Args:
        work: raises where it fails.
        spec: given to it.
        folder: relative paths in the spec are of this one.
    """
    try:
        _go_to(folder)
        work(spec)
    except BaseException as error:
        return _told(error)
    return Said(EXIT_DONE)


def attempt_all(work: WorkOfSeveral, specs: Mapping[str, Mapping[str, Any]], *, folder: str) -> dict[str, Said]:
    """Do the work of several specs at once; what becomes of each, by its id.

    Args:
        work: gives the error that ended each spec's, or None; raises where none of it can be done.
        specs: by id.
        folder: relative paths in the specs are of this one.
    """
    try:
        _go_to(folder)
        errors = work([*specs.values()])
    except BaseException as error:
        errors = [error] * len(specs)
    return {name: Said(EXIT_DONE) if error is None else _told(error) for name, error in zip(specs, errors, strict=True)}


def _go_to(folder: str) -> None:
    warnings.simplefilter("ignore")  # the libraries' notices to developers
    warnings.simplefilter("always", DegradedModel)
    try:
        os.chdir(folder)
    except OSError as error:
        raise DiskError(f"{folder} is not there on this machine: all machines of a study share its files.") from error


def _told(error: BaseException) -> Said:
    """An error as an exit code and a sentence; the log has all of it."""
    if isinstance(error, InUse):
        return Said(error.exit_code, _short(str(error)), in_use=True, wait=error.seconds)
    if isinstance(error, UserError):
        _say(str(error))
        return Said(error.exit_code, _short(str(error)))
    if isinstance(error, KeyboardInterrupt):
        return Said(EXIT_INTERRUPTED)
    if isinstance(error, SystemExit):
        return Said(error.code if isinstance(error.code, int) else EXIT_DONE)
    traceback.print_exception(error)
    return Said(EXIT_INTERNAL, _short(f"{type(error).__name__}: {error}"))


def begin_log(path: str, title: str) -> None:
    """Send standard output and error of this process to the end of a file, below a line that says when and where."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _say(f"--- {title}: {now} on {os.uname().nodename}, process {os.getpid()}")


def point_to(log: str, other: str) -> None:
    """Say in the log of a run that does not write it itself which one has what it says."""
    Path(other).parent.mkdir(parents=True, exist_ok=True)
    with Path(other).open("a", encoding="utf-8") as file:
        file.write(f"--- trained together with others: what was said is in {log}\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
