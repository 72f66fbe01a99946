"""The other end of server.py: starts it, gives it orders, and hears how its children ended.

It is used by the pool for one machine, and by every worker of a Ray cluster.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mllm.errors import EXIT_INTERRUPTED
from peft_mllm.study.engine.jobs import WORK, Ending, EngineError, Job

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""torch then finds devices without opening them: a process that has opened one cannot be forked."""
LAST_LINES = 6
END_SECONDS = 2.0
"""Until a server that was asked to end is killed."""


class Forks:
    """Jobs in forked processes; nothing runs until the first is started.

    Args:
        threads: of each run; sums of floats depend on it.
        work: what is done with a job's spec.
        environment: of all runs, beside this process's own.
    """

    def __init__(self, *, threads: int, work: str = WORK, environment: Mapping[str, str] | None = None) -> None:
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._environment = {**os.environ, **QUIET, **FORK_SAFE, **counts, **(environment or {})}
        self._work = work
        self._server: subprocess.Popen[bytes] | None = None
        self._running: dict[str, Job] = {}
        self._said: dict[str, dict[str, Any]] = {}
        self._stopped: set[str] = set()
        self._outbox: list[dict[str, Any]] = []  # until the server is ready
        self._ready, self._rest = False, b""

    def start(self, job: Job, *, environment: Mapping[str, str], folder: str | None = None) -> None:
        """Begin a job.

        Args:
            job: not under way.
            environment: of this run alone, such as its device.
            folder: that relative paths in its spec are of; the present one if left out.
        """
        if self._server is None:
            self._begin()
        self._running[job.id] = job
        order = {
            "start": job.id,
            "title": job.title,
            "spec": dict(job.spec),
            "members": {member.id: dict(member.spec) for member in job.members},
            "log": str(Path(folder or Path.cwd()) / job.log),
            "logs": [str(Path(folder or Path.cwd()) / member.log) for member in job.members[1:]],
            "folder": folder or str(Path.cwd()),
            "environment": dict(environment),
        }
        self._order(order)

    def endings(self, seconds: float) -> list[Ending]:
        """The jobs that ended; waits for one so long at most.

        Raises:
            EngineError: the server does not start.
        """
        end = time.monotonic() + seconds
        while self._server is not None:
            ended = [each for said in self._heard(max(0.0, end - time.monotonic())) for each in self._understood(said)]
            if self._server.poll() is not None:
                ended += [each for said in self._heard(0.0) for each in self._understood(said)]
                return ended + self._lost()
            if ended or time.monotonic() >= end:
                return ended
        time.sleep(seconds)
        return []

    def signal(self, job: str, number: int) -> None:
        """Send a signal to a job; one that has not begun ends unbegun."""
        if not self._ready:
            self._outbox = [order for order in self._outbox if order.get("start") != job]
            self._stopped.add(job)
        else:
            self._order({"signal": job, "number": number})

    def close(self) -> None:
        """End the server and what it runs."""
        server, self._server = self._server, None
        self._running.clear()
        if server is not None:
            with suppress(OSError):
                server.stdin.close() if server.stdin else None  # then it ends its children, and itself
            if self._ready:
                with suppress(subprocess.TimeoutExpired):
                    server.wait(END_SECONDS)
            server.kill()  # its children die with it
            server.wait()
            for pipe in (server.stdin, server.stdout, self._errors):
                with suppress(OSError):
                    pipe.close() if pipe else None

    def _begin(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._outbox = []
        self._stopped = set()
        self._ready, self._rest = False, b""
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "peft_mllm.study.engine.server", str(os.getpid()), self._work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for us, who then ask the runs to save
        )

    def _order(self, order: dict[str, Any]) -> None:
        # before the server reads, what is too long for the pipe would hold us up
        if not self._ready:
            self._outbox.append(order)
            return
        assert self._server is not None, "there is a server to give orders to"
        assert self._server.stdin is not None, "it was started with a pipe"
        with suppress(BrokenPipeError):  # it is gone, and `endings` will say so
            self._server.stdin.write(json.dumps(order).encode() + b"\n")
            self._server.stdin.flush()

    def _heard(self, seconds: float) -> list[dict[str, Any]]:
        """What the server said within a time."""
        assert self._server is not None, "there is a server to hear"
        assert self._server.stdout is not None, "it was started with a pipe"
        ready, _, _ = select.select([self._server.stdout], [], [], seconds)
        piece = os.read(self._server.stdout.fileno(), 1 << 16) if ready else b""
        if ready and not piece:  # the end of its output
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(1.0)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def _understood(self, said: dict[str, Any]) -> list[Ending]:
        if "ready" in said:
            self._ready = True
            orders, self._outbox = self._outbox, []
            for order in orders:
                self._order(order)
            unbegun, self._stopped = self._stopped, set()
            return [
                ending
                for job in sorted(unbegun & self._running.keys())
                for ending in self._endings(job, EXIT_INTERRUPTED, begun=False)
            ]
        if "said" in said:
            self._said[said["said"]] = said
            return []
        return self._endings(said["ended"], said["code"])

    def _endings(self, name: str, code: int | None, message: str = "", *, begun: bool = True) -> list[Ending]:
        """How a job ended, or each member of a bundle: one that said nothing ended well, where others said why not."""
        job = self._running.pop(name)
        if not job.members:
            return [self._ending(name, code, message, job.log)]
        said = any(member.id in self._said for member in job.members)
        silent = 0 if begun and said and code is not None and code > 0 else code
        codes = {member.id: self._said.get(member.id, {}).get("code", silent) for member in job.members}
        return [replace(self._ending(member, code, message, job.log), bundle=name) for member, code in codes.items()]

    def _ending(self, name: str, code: int | None, message: str, log: Path) -> Ending:
        said = self._said.pop(name, {})
        if code == 0:
            return Ending(name, code)
        message = said.get("message") or message or last_lines(log)
        return Ending(name, code, message, in_use=bool(said.get("in_use")), wait=said.get("wait"))

    def _lost(self) -> list[Ending]:
        """The server is gone, and with it what it ran; the next job starts another."""
        assert self._server is not None, "a server that was there is gone"
        code = self._server.wait()
        self._errors.seek(0)
        complaint = self._errors.read().decode(errors="replace").strip()
        why = f"the process that started it ended with code {code}"
        lost = [ending for job in [*self._running] for ending in self._endings(job, None, why)]
        ready = self._ready
        self.close()
        if code > 0 and not ready:
            end = "\n".join(complaint.splitlines()[-LAST_LINES:])
            raise EngineError(f"A process for runs does not start:\n{end}")
        return lost


def last_lines(log: Path) -> str:
    """The end of a log, for a message: why a process ended that could not say so itself."""
    try:
        text = log.read_bytes()[-4000:].decode(errors="replace")
    except OSError:
        return "it said nothing"
    lines = [line for line in text.splitlines() if line.strip()]
    own = lines[max((i for i, line in enumerate(lines) if line.startswith("--- ")), default=-1) + 1 :]
    return "\n".join([*own[-LAST_LINES:], f"(all of it: {log})"])
