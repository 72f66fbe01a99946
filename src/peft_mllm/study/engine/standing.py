"""How the runs of a study stand, read from their directories alone: for `study status` and for the live view."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft_mllm.files import read_json
from peft_mllm.rundir import RunDir
from peft_mllm.rundir.lock import LEASE, LOCK, recorded_holder
from peft_mllm.study.attempts import Attempts, last_of
from peft_mllm.study.engine.jobs import Job

State = Literal["done", "running", "interrupted", "failed", "set aside", "waiting"]

TAIL = 4096
"""Bytes at the end of metrics.jsonl in which its last lines are looked for."""


@dataclass(frozen=True)
class Standing:
    """One run.

    Attributes:
        state: "interrupted" is saved or killed, and goes on; "failed" is tried again; "set aside" is not;
            "waiting" has never begun.
        host: that it runs on.
        stage: what it does there: "training", "scoring NAME".
        step: of training.
        total: steps that it will take; None where that is not known yet.
        loss: the last that was logged.
        tokens_per_second: likewise.
        failures: attempts that failed.
        cause: of the last one.
    """

    id: str
    title: str
    state: State
    host: str = ""
    stage: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    failures: int = 0
    cause: str = ""


def status_of(jobs: Iterable[Job], attempts_dir: Path) -> list[Standing]:
    """How each run stands, finished ones included, in the order given.

    Raises:
        DiskError, DataError: a result or an attempts file is not what was written.
    """
    attempts = Attempts(attempts_dir)
    return [standing_of(job, attempts) for job in jobs]


def standing_of(job: Job, attempts: Attempts) -> Standing:
    """How one run stands."""
    if RunDir(job.directory).result() is not None:
        return Standing(job.id, job.title, "done")
    now = progress(job)
    if now.state == "running" and holder_lives(job.directory / LOCK):
        return now
    before = attempts.of(job.id)
    failures, cause = attempts.failures(job.id), last_of(before)
    at = replace(now, host="", failures=failures, cause=cause)
    if before and before[-1].state == "set aside":
        return replace(at, state="set aside")
    if before and before[-1].state == "failed":
        return replace(at, state="failed")
    if now.state == "failed" and not before:  # by hand, or by a driver that died before it could say so
        return replace(at, state="failed", failures=1, cause=now.cause)
    return replace(at, state="waiting" if now.state == "waiting" else "interrupted")


def progress(job: Job) -> Standing:
    """What a run says of itself, whether it still lives or not."""
    said = _status(job.directory)
    if said is None:
        return Standing(job.id, job.title, "waiting")
    line = _last_step(job.directory / "metrics.jsonl")
    return Standing(
        job.id,
        job.title,
        said.get("state", "running"),
        host=said.get("host", ""),
        stage=said.get("stage") or "",
        step=line.get("step", said.get("step")),
        total=said.get("total"),
        loss=_number(line.get("loss")),
        tokens_per_second=_number(line.get("tokens_per_second")),
        cause=said.get("message") or "",
    )


def holder_lives(lock: Path) -> bool:
    """Whether the writer of a run is alive, as far as its lock file shows: it renews it, and its process is there."""
    holder = recorded_holder(lock)
    if holder is None or holder.get("released"):
        return False
    with suppress(OSError):
        if time.time() - lock.stat().st_mtime > LEASE:
            return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _status(directory: Path) -> dict[str, Any] | None:
    try:
        said = read_json(directory / "status.json")
    except (OSError, ValueError):  # not there yet; a whole one is shown at the next look
        return None
    return said if isinstance(said, dict) else None


def _last_step(log: Path) -> dict[str, Any]:
    """The last line of a training step; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and "loss" in said:
                return said
    return {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None
