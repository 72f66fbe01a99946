"""One machine: a process for each run, so many at a time, each with a device or with cores of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from peft_mllm.study.engine.forks import Forks
from peft_mllm.study.engine.jobs import WORK, Ending, Engine, Job


class Pool(Engine):
    """Runs of this machine.

    Args:
        slots: how many runs at once; if left out one per GPU, or without a GPU as many as the cores have threads for.
        threads: of each run; if left out 1, or with GPUs a share of the cores. Figures depend on it in their last
            digits, and a result says it.
        work: what is done with a job's spec.
    """

    def __init__(self, *, slots: int | None = None, threads: int | None = None, work: str = WORK) -> None:
        devices, cores = visible_devices(), cores_of_this_machine()
        self._slots = slots or len(devices) or max(1, cores // (threads or 1))
        self.threads = threads or (max(1, cores // self._slots) if devices else 1)
        self._devices = devices
        self._free = list(range(self._slots))
        self._taken: dict[str, int] = {}
        self._forks = Forks(threads=self.threads, work=work)

    @property
    def slots(self) -> int:
        """How many runs at once."""
        return self._slots

    @property
    def has_devices(self) -> bool:
        """Whether runs have GPUs."""
        return bool(self._devices)

    @property
    def name(self) -> str:
        """In words."""
        on = f" on {len(self._devices)} GPU{'s' * (len(self._devices) > 1)}" if self._devices else ""
        return (
            f"{self._slots} process{'es' * (self._slots > 1)}{on}, {self.threads} thread{'s' * (self.threads > 1)} each"
        )

    def start(self, job: Job) -> None:
        """Begin a job in the first free slot."""
        slot = self._free.pop(0)
        self._taken[job.id] = slot
        device = {"CUDA_VISIBLE_DEVICES": self._devices[slot % len(self._devices)]} if self._devices else {}
        self._forks.start(job, environment=device)

    def endings(self, seconds: float) -> Sequence[Ending]:
        """What ended; its slot is free."""
        ended = self._forks.endings(seconds)
        for each in ended:
            if (slot := self._taken.pop(each.bundle or each.id, None)) is not None:  # a bundle's members have one
                self._free.append(slot)
        self._free.sort()
        return ended

    def stop(self) -> None:
        """SIGTERM to every run: it saves, and ends with 75."""
        for job in self._taken:
            self._forks.signal(job, signal.SIGTERM)

    def close(self) -> None:
        """SIGKILL to what is left."""
        self._forks.close()


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; without asking torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = [name.strip() for name in chosen.split(",") if name.strip()]
        return [] if "-1" in named else named
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return said.stdout.split() if said.returncode == 0 else []


def cores_of_this_machine() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
