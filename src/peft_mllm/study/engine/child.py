"""What happens in a run's own process: one spec is trained and evaluated, its output goes to the run's log."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_mllm.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED, DegradedModel, DiskError, UserError
from peft_mllm.rundir import InUse

Work = Callable[[Mapping[str, Any]], object]

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
    warnings.simplefilter("ignore")  # the libraries' notices to developers
    warnings.simplefilter("always", DegradedModel)
    try:
        try:
            os.chdir(folder)
        except OSError as error:
            raise DiskError(
                f"{folder} is not there on this machine: all machines of a study share its files."
            ) from error
        work(spec)
    except InUse as error:
        return Said(error.exit_code, _short(str(error)), in_use=True, wait=error.seconds)
    except UserError as error:
        _say(str(error))
        return Said(error.exit_code, _short(str(error)))
    except KeyboardInterrupt:
        return Said(EXIT_INTERRUPTED)
    except SystemExit as end:
        return Said(end.code if isinstance(end.code, int) else EXIT_DONE)
    except BaseException as error:
        traceback.print_exc()
        return Said(EXIT_INTERNAL, _short(f"{type(error).__name__}: {error}"))
    return Said(EXIT_DONE)


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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
