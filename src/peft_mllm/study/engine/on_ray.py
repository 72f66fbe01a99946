"""Several machines: the same jobs, each a task of Ray's that watches a forked process (extra `ray`).

Ray places tasks and says when a machine is gone, and is asked for no more: it retries nothing and holds no truth. A
task computes nothing itself. It starts the server that the pool uses as well, so a run has a process of its own here
too, which ends with the task's.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_mllm.study.engine.forks import Forks
from peft_mllm.study.engine.jobs import WORK, Ending, Engine, EngineError, Job
from peft_mllm.study.engine.mortal import die_with

LOOK_SECONDS = 0.25
"""Between two looks of a task at its run, and at whether it is to stop."""
COUNT_SECONDS = 5.0
"""Between two counts of what the cluster has: machines come and go."""
REACH_SECONDS = 10.0
SMALLEST_STORE = 80 * 2**20
"""Bytes of Ray's object store: nothing passes through it but a spec."""
PASSED_ON = ("HF_", "PEFT_MLLM_", "TRANSFORMERS_", "PYTHONPATH", "MPLBACKEND")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""A driver's variables that begin like the first go to all machines, unless a word like these is in them."""


class RayCluster(Engine):
    """Runs of a Ray cluster.

    Args:
        address: of its head, `HOST:6379` or `auto`; without one the cluster of RAY_ADDRESS, and without that a new one
            on this machine, which ends with the driver.
        slots: how many runs at once; as many as the cluster has room for if left out.
        threads: processor cores of each run; 1 if left out.
        gpus: of each run, 0.5 is two runs on one; 1 where the cluster has any, if left out.
        work: what is done with a job's spec.

    Raises:
        EngineError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        slots: int | None = None,
        threads: int | None = None,
        gpus: float | None = None,
        work: str = WORK,
    ) -> None:
        self._ray = _connected(address or os.environ.get("RAY_ADDRESS") or "local")
        resources = self._ray.cluster_resources()
        self.threads = threads or 1
        self._gpus = gpus if gpus is not None else float(resources.get("GPU", 0) > 0)
        self._most, self._work = slots, work
        self._counted, self._room, self._machines = 0.0, 1, 0
        self._tasks: dict[Any, Job] = {}
        self._attempt = self._ray.remote(attempt).options(
            num_cpus=self.threads,
            num_gpus=self._gpus,
            max_retries=0,  # attempts are counted by us, in a file
        )

    @property
    def slots(self) -> int:
        """How many runs the cluster has room for; at least one, which then waits for a machine."""
        self._count()
        return max(1, self._room if self._most is None else min(self._room, self._most))

    @property
    def name(self) -> str:
        """In words."""
        self._count()
        return f"Ray, {self._machines} machine{'s' * (self._machines != 1)}"

    def start(self, job: Job) -> None:
        """Hand a job to Ray."""
        order = {**asdict(job), "directory": str(job.directory), "spec": dict(job.spec)}
        task = self._attempt.remote(order, self._work, self.threads, str(Path.cwd()), passed_on(os.environ))
        self._tasks[task] = job

    def endings(self, seconds: float) -> Sequence[Ending]:
        """What ended, or was lost with its machine."""
        if not self._tasks:
            time.sleep(seconds)
            return []
        tasks = list(self._tasks)
        ended, _ = self._ray.wait(tasks, num_returns=1, timeout=seconds)
        if ended:  # whatever else has ended by now
            ended, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)
        return [self._ending(task, self._tasks.pop(task)) for task in ended]

    def stop(self) -> None:
        """SIGTERM to every run by way of its task; one that has not begun never does."""
        for task in self._tasks:
            self._ray.cancel(task, force=False)

    def close(self) -> None:
        """Leave the cluster, which ends our tasks and what they run; one that was made for us ends too."""
        self._ray.shutdown()

    def _count(self) -> None:
        """See what the cluster has, if the last look is some time ago."""
        if not self._counted or time.monotonic() - self._counted > COUNT_SECONDS:
            self._counted = time.monotonic()
            rooms = [self._room_of(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
            self._room, self._machines = sum(rooms), sum(room > 0 for room in rooms)

    def _room_of(self, resources: Mapping[str, float]) -> int:
        """How many runs fit on a machine."""
        by_cores = resources.get("CPU", 0.0) // self.threads
        return int(min(by_cores, resources.get("GPU", 0.0) // self._gpus) if self._gpus else by_cores)

    def _ending(self, task: Any, job: Job) -> Ending:
        errors = self._ray.exceptions
        try:
            said: dict[str, Any] = self._ray.get(task)
        except errors.TaskCancelledError:
            return Ending(job.id, None, "it was stopped before it began")
        except errors.RayTaskError as error:  # not the run's doing: a run is a process below the task
            raise EngineError(f"A worker of Ray cannot run anything: {_cause(error)}") from None
        except errors.RayError as error:
            return Ending(job.id, None, f"Ray lost it: {_cause(error)}")
        return Ending(**said)


_forks: dict[tuple[str, int], Forks] = {}
"""Of this worker of Ray: tasks that come to it later find everything imported."""


def attempt(order: dict[str, Any], work: str, threads: int, folder: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run a job in a forked process; happens in a worker of Ray.

    Args:
        order: a job's fields.
        work: what is done with its spec.
        threads: of the run.
        folder: that relative paths are of.
        environment: of the driver, as far as it is passed on.

    Returns:
        the fields of an ending.
    """
    if not _forks:
        die_with(os.getppid())  # a worker outlives its machine's raylet by many seconds, and would write on
    job = Job(**{**order, "directory": Path(order["directory"])})
    forks = _forks.setdefault((work, threads), Forks(threads=threads, work=work, environment=environment))
    host, stopping = socket.gethostname(), False
    # a worker may be given another device for each task
    devices = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
    forks.start(job, environment=devices, folder=folder)
    while True:
        try:
            for ending in forks.endings(LOOK_SECONDS):
                return {**asdict(ending), "host": host}
        except KeyboardInterrupt:  # how Ray cancels a task
            if not stopping:
                forks.signal(job.id, signal.SIGTERM)
            stopping = True


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The driver's variables that a run on another machine needs as well; no secrets among them."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(PASSED_ON) and not any(word in name for word in SECRET)
    }


def _connected(address: str) -> Any:
    """Ray, connected to a cluster, and as quiet as it can be."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.exceptions")
    except ImportError as error:
        raise EngineError(f"Ray is not installed ({error}): pip install 'peft-mllm[ray]'.") from error
    _refuse_unreachable(address)
    local = {"include_dashboard": False, "object_store_memory": SMALLEST_STORE} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # of many kinds, by what is wrong
        raise EngineError(f"{_nobody_at(address)} Ray says: {_cause(error)}") from error
    _silence(ray)
    return ray


def _silence(ray: Any) -> None:
    """Keep Ray's remarks on lost machines off standard output, which is for results; we make our own."""
    printer: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(printer, "print_to_stdstream"):  # it has no setting for that
        printer.print_to_stdstream = lambda *said, **how: None


def _refuse_unreachable(address: str) -> None:
    """Try the address for seconds; Ray would for minutes."""
    if address.startswith("ray://"):
        raise EngineError(
            f"{address} is Ray's way in from outside. A study is conducted on a machine of the cluster, which shares "
            "its files: start it there with --address auto."
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
        except OSError as error:
            raise EngineError(f"{_nobody_at(address)} ({error})") from error


def _nobody_at(address: str) -> str:
    return (
        f"There is no Ray cluster at {address}. Start one with `ray start --head --port 6379`, or leave --address out "
        "to have one made on this machine."
    )


def _cause(error: BaseException) -> str:
    """The line of an error that says most: Ray's begin or end with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line]
    return (telling or lines or [type(error).__name__])[-1]
