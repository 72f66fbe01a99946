"""Keeps an engine busy with a study's runs until each has a result or is set aside.

Nothing is kept here that a kill could take: which runs are open is asked of the files whenever one has ended, and what
failed is in the attempts. So the same command goes on where it stopped, and two drivers may work on one study: each
run has one writer, and whoever comes second puts it back and asks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_mllm.errors import EXIT_DISK, EXIT_DONE, EXIT_INTERRUPTED, RESUME, DiskError, Interrupted
from peft_mllm.interrupt import stop_requests
from peft_mllm.study.attempts import MOST_ATTEMPTS, Attempts, progress_of
from peft_mllm.study.engine.jobs import Ending, Engine, Job
from peft_mllm.study.engine.live import Board, View
from peft_mllm.study.wording import duration

TICK = 0.25
"""Seconds that a wait for endings takes at most: then the view is drawn, and a wish to stop is seen."""
AGAIN = 5.0
"""Seconds until a run that another process held is tried again."""
FULL_DISK = 3
"""Different runs in a row that could not write: then it is not for the runs, and nothing more is begun."""
FROM_OUTSIDE = frozenset({EXIT_INTERRUPTED, -1, -2, -9, -15})
"""How a run ends that somebody stopped or killed (SIGHUP, SIGINT, SIGKILL, SIGTERM): no failure of its own."""


@dataclass(frozen=True)
class Conducted:
    """How a study ended.

    Attributes:
        done: runs that were open and have a result now.
        failed: runs that were set aside, now or before, each with its cause.
        waiting: how many runs could not become known, since what they are chosen by was set aside.
    """

    done: tuple[str, ...]
    failed: Mapping[str, str]
    waiting: int


def conduct(
    jobs: Callable[[], Sequence[Job]],
    engine: Engine,
    *,
    attempts_dir: Path,
    attempts: int = MOST_ATTEMPTS,
    expected: int,
    done: int = 0,
    retry: bool = False,
    view: View,
) -> Conducted:
    """Run what is open until nothing is.

    Args:
        jobs: all runs that are known now and have no verified result, the most wanted first; asked again whenever
            one has ended.
        engine: closed at the end.
        attempts_dir: of the study's failures.
        attempts: failures after which a run is set aside.
        expected: all runs of the study, those included that are not known yet, and those done before.
        done: how many had a result before.
        retry: try again what was set aside.
        view: shown what happens.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; the runs under way are saved.
        DiskError: several runs in a row could not write.
        EngineError: nothing can be run.
    """
    ledger = Attempts(attempts_dir, most=attempts)
    try:
        with stop_requests() as stop, engine, view:
            conductor = Conductor(jobs, engine, ledger, view, expected=expected, before=done)
            if retry:
                conductor.forgive()
            return conductor.conduct(stop)
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped at once: what was under way goes on from its last checkpoint; {RESUME}") from None


class Conductor:
    """The state of one call of `conduct`."""

    def __init__(
        self,
        jobs: Callable[[], Sequence[Job]],
        engine: Engine,
        ledger: Attempts,
        view: View,
        *,
        expected: int,
        before: int,
    ) -> None:
        self._jobs, self._engine, self._ledger, self._view = jobs, engine, ledger, view
        self._expected, self._before = expected, before
        self._running: dict[str, tuple[Job, float]] = {}  # with when it began
        self._held: dict[str, float] = {}  # by another process, with when to try again
        self._done: dict[str, None] = {}  # in the order in which they ended
        self._durations: list[float] = []
        self._cannot_write: set[str] = set()
        self._open: dict[str, Job] = {}
        self._aside: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._look()

    def forgive(self) -> None:
        """Begin the count of what was set aside anew."""
        for run in self._aside:
            self._ledger.forgive(run)
        self._count()

    def conduct(self, stop: Callable[[], bool]) -> Conducted:
        """Until nothing is open."""
        while not stop():
            self._fill()
            if not self._running and not self._held:
                waiting = self._expected - self._before - len(self._done) - len(self._aside)
                return Conducted(tuple(self._done), dict(self._aside), max(0, waiting))
            self._hear()
            if len(self._cannot_write) >= FULL_DISK:
                message = self._wind_down(self._last_cause)
                raise DiskError(f"Several runs cannot write, so nothing more is begun. The last said: {message}")
        saved = len(self._running)
        self._wind_down()
        raise Interrupted(
            f"Stopped: {saved} run{'s' * (saved != 1)} under way {'were' if saved != 1 else 'was'} saved; {RESUME}"
        )

    def _look(self) -> None:
        """Ask the files which runs are open, and which are set aside."""
        listed = {job.id: job for job in self._jobs()}
        for gone in self._open.keys() - listed.keys() - self._running.keys():  # another driver did it
            self._done[gone] = None
        self._open = listed
        self._count()

    def _count(self) -> None:
        """Read what failed how often, and what is set aside."""
        causes = {run: self._ledger.set_aside(run) for run in self._open}
        self._aside = {run: cause for run, cause in causes.items() if cause is not None}
        self._failures = {run: self._ledger.failures(run) for run in self._open}
        still = self._open.keys() - self._aside.keys()
        self._held = {run: when for run, when in self._held.items() if run in still}

    def _fill(self) -> None:
        """Start what is open, the failed ones last, while there are slots."""
        now = time.monotonic()
        if any(when <= now for when in self._held.values()):
            self._look()  # what was held may be done
            self._held = {run: when for run, when in self._held.items() if when > now}
        blocked = self._running.keys() | self._aside.keys() | self._held.keys() | self._done.keys()
        ready = [job for run, job in self._open.items() if run not in blocked]
        ready.sort(key=lambda job: self._failures[job.id])
        for job in ready[: max(0, self._engine.slots - len(self._running))]:
            self._running[job.id] = job, now
            self._engine.start(job)

    def _hear(self) -> list[Ending]:
        """Wait a moment for runs that end, and see what that means."""
        if self._running:
            endings = list(self._engine.endings(TICK))
        else:
            endings = []
            time.sleep(TICK)
        if endings:
            ended = {ending.id: self._running.pop(ending.id) for ending in endings}
            self._look()
            for ending in endings:
                self._judge(ending, *ended[ending.id])
            self._count()
        self._view.show(self._board())
        return endings

    def _judge(self, ending: Ending, job: Job, began: float) -> None:
        """What an ending means for its run."""
        if ending.in_use:
            self._held[job.id] = time.monotonic() + max(AGAIN, min(ending.wait or 0.0, 6 * AGAIN))
        elif job.id not in self._open:  # whatever became of its process: its result verifies
            self._succeed(job, time.monotonic() - began)
        elif ending.code == EXIT_DONE:
            self._fail(
                job, ending, "it ended well, but has no result that verifies. Does every machine see the same files?"
            )
        elif ending.code is None or ending.code in FROM_OUTSIDE:
            self._lose(job, ending)
        else:
            self._fail(job, ending, ending.message or f"exit code {ending.code}")

    def _succeed(self, job: Job, seconds: float) -> None:
        self._done[job.id] = None
        self._durations.append(seconds)
        self._cannot_write.clear()
        self._view.ended(job.title, f"done in {duration(seconds)}")

    def _fail(self, job: Job, ending: Ending, cause: str) -> None:
        state = self._ledger.failed(job.id, ending.code, cause, host=ending.host)
        self._last_cause = cause
        if ending.code == EXIT_DISK:
            self._cannot_write.add(job.id)
        self._view.ended(
            job.title, f"{'set aside' if state == 'set aside' else 'failed, will be tried again'}: {cause}"
        )

    def _lose(self, job: Job, ending: Ending) -> None:
        """Lost with its machine, or stopped by somebody."""
        cause = ending.message or "stopped from outside"
        state = self._ledger.lost(job.id, ending.code, cause, progress=progress_of(job.directory), host=ending.host)
        how = "set aside" if state == "set aside" else "goes on later"
        self._view.ended(job.title, f"lost, {how}: {cause}")

    def _wind_down(self, cause: str = "") -> str:
        """Let what is under way save and end; gives the cause back."""
        self._engine.stop()
        while self._running:
            endings = list(self._engine.endings(TICK))
            ended = {ending.id: self._running.pop(ending.id) for ending in endings}
            if ended:
                self._look()
            for ending in endings:
                if ending.code is not None and ending.code not in FROM_OUTSIDE and not ending.in_use:
                    self._judge(ending, *ended[ending.id])
            self._view.show(self._board())
        return cause

    def _board(self) -> Board:
        return Board(
            engine=self._engine.name,
            expected=self._expected,
            done=self._before + len(self._done),
            set_aside=len(self._aside),
            elsewhere=len(self._held),
            slots=self._engine.slots,
            running=[job for job, _ in self._running.values()],
            left=self._left(),
        )

    def _left(self) -> float | None:
        """Seconds: what is left at the mean duration of the runs that ended here."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        open_ = self._expected - self._before - len(self._done) - len(self._aside)
        now = time.monotonic()
        spent = sum(min(now - began, mean) for _, began in self._running.values())
        return max(0.0, open_ * mean - spent) / max(1, self._engine.slots)
