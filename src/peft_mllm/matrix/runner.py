"""Trying pairs in worker processes with a time limit; what is found is written at once, and taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft_mllm
from peft_mllm.errors import EXIT_INTERNAL, RESUME, Interrupted, UserError
from peft_mllm.files import append_line, atomic_write, read_lines
from peft_mllm.interrupt import stop_requests
from peft_mllm.matrix.probes import PROBES
from peft_mllm.matrix.result import Pair, installed
from peft_mllm.screen import Screen

SECONDS = 120.0
"""A pair may take this long; it takes one or two."""
START_SECONDS = 300.0
POLL_SECONDS = 0.5
COMMAND = (sys.executable, "-m", "peft_mllm.matrix.worker")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
Name = tuple[str, str]
"""Of a pair: candidate and member."""
Tried = tuple[Pair, dict[str, str]]
"""A pair, and the facts of its tiny model; no facts where the process ended."""


class WorkerError(UserError):
    """A worker process does not start."""

    exit_code = EXIT_INTERNAL


def probe(wanted: Sequence[Name], journal: Path, *, jobs: int, screen: Screen, seconds: float = SECONDS) -> list[Tried]:
    """Try pairs, in this order; those that the journal has are not tried again.

    Args:
        wanted: pairs; a worker keeps the last model it made, so those of one model come together.
        journal: JSON lines, one a pair, below a first one that says with what they were made.
        jobs: worker processes.
        screen: shows a bar.
        seconds: limit of one pair.

    Raises:
        Interrupted: somebody asked to stop; the journal has what is done.
        WorkerError: a worker process does not start.
    """
    done = _taken_up(journal)
    left = [name for name in wanted if name not in done]
    with (
        stop_requests() as stop,
        screen.bar("trying methods", len(wanted)) as bar,
        _crew(left, min(jobs, len(left)), seconds) as found,
    ):
        bar.advance(to=len(wanted) - len(left))
        for _ in left:
            pair, facts = _next(found, stop)
            done[pair.candidate, pair.member] = pair, facts
            append_line(journal, {**asdict(pair), "facts": facts})
            bar.advance(facts={"last": f"{pair.candidate} on {pair.member}"})
    return [done[name] for name in wanted]


def made_with() -> dict[str, Any]:
    """What verdicts depend on: versions, and all of our own code."""
    digest = hashlib.sha256()
    root = Path(peft_mllm.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    return {"versions": installed(), "code": digest.hexdigest()}


def _taken_up(journal: Path) -> dict[Name, Tried]:
    """What a journal has; one that was made with something else is begun anew."""
    header = made_with()
    lines = read_lines(journal)
    if lines[:1] != [header]:
        atomic_write(journal, "", what="the journal")
        append_line(journal, header)
        return {}
    facts = [each.pop("facts") for each in lines[1:]]
    pairs = [Pair(**each | {"ok": tuple(each["ok"])}) for each in lines[1:]]
    return {(pair.candidate, pair.member): (pair, fact) for pair, fact in zip(pairs, facts, strict=True)}


Found = queue.SimpleQueue[Tried | BaseException]


@contextmanager
def _crew(left: Sequence[Name], size: int, seconds: float) -> Iterator[Found]:
    """Threads, each with a worker process of its own, that put what they find into a queue."""
    todo: queue.SimpleQueue[Name] = queue.SimpleQueue()
    for name in left:
        todo.put(name)
    found: Found = queue.SimpleQueue()
    halt = threading.Event()
    workers: list[Worker] = [Worker() for _ in range(size)]
    threads = [threading.Thread(target=_serve, args=(worker, todo, found, halt, seconds)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        halt.set()
        for worker in workers:
            worker.close()
        for thread in threads:
            thread.join()


def _serve(worker: Worker, todo: queue.SimpleQueue[Name], found: Found, halt: threading.Event, seconds: float) -> None:
    while not halt.is_set():
        try:
            candidate, member = todo.get_nowait()
        except queue.Empty:
            return
        try:
            found.put(worker.attempt(candidate, member, seconds))
        except BaseException as error:  # the main thread raises it
            found.put(error)
            return


def _next(found: Found, stop: Callable[[], bool]) -> Tried:
    while not stop():
        try:
            tried = found.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if isinstance(tried, BaseException):
            raise tried
        return tried
    raise Interrupted(f"Stopped: {RESUME}")


class Worker:
    """A process of worker.py, started when it is needed and again after it was lost.

    Args:
        command: what starts it, where it is not worker.py.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def attempt(self, candidate: str, member: str, seconds: float) -> Tried:
        """Try a pair; where it hangs or ends the process, that is the verdict on the probe it was at."""
        if self._process is None:
            self._process = self._started()
        process = self._process
        verdicts: dict[str, tuple[str, str]] = {}
        assert process.stdin is not None
        process.stdin.write(json.dumps({"candidate": candidate, "member": member}) + "\n")
        process.stdin.flush()
        for said in self._heard(process, seconds):
            if "done" in said:
                return _pair(candidate, member, verdicts), said["done"]
            verdicts[said["probe"]] = said["state"], said["reason"]
        ended = process.wait()
        self._process = None
        at = next((name for name in PROBES if name not in verdicts), "attaches")
        what = f"it took longer than {seconds:.0f} seconds" if ended == -9 else f"the process ended with code {ended}"
        verdicts[at] = "failed", what
        for name in PROBES:
            verdicts.setdefault(name, ("none", f"not tried, since at '{at}' {what}"))
        return _pair(candidate, member, verdicts), {}

    def close(self) -> None:
        """End the process."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _started(self) -> subprocess.Popen[str]:
        # a session of its own: Ctrl-C is for us, who then end it
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | OFFLINE,
            start_new_session=True,
        )
        self._process = process
        if next(self._heard(process, START_SECONDS), None) is None and not self._closed:
            raise WorkerError("A worker process does not start. See why: python -m peft_mllm.matrix.worker < /dev/null")
        return process

    def _heard(self, process: subprocess.Popen[str], seconds: float) -> Iterator[dict[str, Any]]:
        """Lines until the process ends; it is ended when it takes too long."""
        assert process.stdout is not None
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            watchdog.cancel()


def _pair(candidate: str, member: str, verdicts: dict[str, tuple[str, str]]) -> Pair:
    of = {
        state: {name: why for name, (how, why) in verdicts.items() if how == state}
        for state in ("ok", "failed", "none")
    }
    return Pair(candidate, member, ok=tuple(of["ok"]), failed=of["failed"], none=of["none"])
