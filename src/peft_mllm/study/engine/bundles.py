"""Runs of one base in one process: started by any engine, each ends by itself.

What a base costs, its loading, the check of the data, the images, the start of a process, is then paid once for all of
a bundle; and where steps are small its products are computed for all at once (together/). Each run has its directory,
and its result is that of the run alone; so a study does not know of bundles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_mllm.errors import EXIT_DONE, EXIT_INTERRUPTED
from peft_mllm.study.engine.jobs import Ending, Engine, Job


@dataclass
class Bundles(Engine):
    """An engine that is given up to so many runs in a job.

    Attributes:
        inner: what runs the bundles.
        most: runs in one.
        questions: of a micro-batch, at most, where a run goes with others; None is any number.
    """

    inner: Engine
    most: int
    questions: int | None = None
    _waiting: list[Job] = field(default_factory=list)
    _running: dict[str, set[str]] = field(default_factory=dict)
    _apart: set[str] = field(default_factory=set)
    _stopped: bool = False

    @property
    def slots(self) -> int:
        """How many runs at once."""
        return self.inner.slots * self.most

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.inner.name}, up to {self.most} runs of one base together"

    def start(self, job: Job) -> None:
        """Take a job; it begins when what may go with it is known."""
        self._waiting.append(job)

    def endings(self, seconds: float) -> Sequence[Ending]:
        """What ended."""
        if self._stopped:
            unbegun = [Ending(job.id, EXIT_INTERRUPTED) for job in self._waiting]
            self._waiting.clear()
            if unbegun:
                return unbegun
        self._fill()
        ended = self.inner.endings(seconds)
        for each in ended:
            bundle = each.bundle or each.id
            self._running[bundle].discard(each.id)
            if not self._running[bundle]:
                del self._running[bundle]
            if each.bundle and each.code not in (EXIT_DONE, EXIT_INTERRUPTED) and not each.in_use:
                self._apart.add(each.id)  # one that falls over takes all with it: which it was, is seen now
        return ended

    def stop(self) -> None:
        """Ask what runs to save and end; what waits never begins."""
        self._stopped = True
        self.inner.stop()

    def close(self) -> None:
        """End what is left."""
        self._waiting.clear()
        self.inner.close()

    def _fill(self) -> None:
        """Begin what waits, shared out evenly: a free slot is worth more than a larger bundle."""
        for free in range(self.inner.slots - len(self._running), 0, -1):
            if not self._waiting:
                return
            members = self._mates(min(self.most, math.ceil(len(self._waiting) / free)))
            job = members[0] if len(members) == 1 else bundle_of(members)
            self._running[job.id] = {member.id for member in members}
            self.inner.start(job)

    def _mates(self, count: int) -> list[Job]:
        """The first that waits, and others of its base; one that did not end well among others is by itself."""
        kind = self._kind(self._waiting[0])
        members = [job for job in self._waiting if self._kind(job) == kind][:count]
        self._waiting = [job for job in self._waiting if job not in members]
        return members

    def _kind(self, job: Job) -> str:
        """Equal for runs that go together."""
        step = (job.spec.get("train") or {}).get("per_device_train_batch_size", math.inf)
        large = self.questions is not None and step > self.questions
        return job.id if large or job.id in self._apart else base_of(job)


def bundle_of(members: Sequence[Job]) -> Job:
    """Several jobs as one."""
    first = members[0]
    return Job(
        id="+".join(member.id for member in members),
        title=f"{first.title} and {len(members) - 1} more",
        directory=first.directory,
        spec={},
        members=tuple(members),
    )


def base_of(job: Job) -> str:
    """Equal for runs that may share a base."""
    train, speed = job.spec.get("train") or {}, job.spec.get("speed") or {}
    alone = job.spec.get("vision") == "tuned" or speed.get("shard", "auto") not in ("auto", "none")
    return json.dumps([job.spec.get("model"), train.get("bf16", False), job.id if alone else ""], sort_keys=True)
