"""Trainers that take a step in turn, A-B-A-B in one process, and what each step took.

Each trainer runs in a thread of its own and calls `stepped` at the end of each step; only one of them runs at a time.
So whatever the machine does meanwhile, heat or neighbours, does it to both members of a pair.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Stepped = Callable[[], None]
AGREEING = 1.05
"""Rounds whose ratios are apart by no more than this are enough of them."""


class OverError(Exception):
    """Raised in a trainer whose last turn is over, to end it there."""


@dataclass
class Side:
    """One trainer.

    Attributes:
        name: in tables.
        train: trains without end, and calls its argument after each step.
        of: the trainer that this is one way to run; of several ways only the quickest goes on after the first round.
        seconds: of each step after the first, which is the warm-up.
    """

    name: str
    train: Callable[[Stepped], None]
    of: str = ""
    seconds: list[float] = field(default_factory=list)


class _Player:
    """A side's thread with its turn."""

    def __init__(self, side: Side):
        self.side = side
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=side.name, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Let it run to the end of its next step.

        Raises:
            RuntimeError: it failed, or ended early.
        """
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError(f"{self.side.name} failed: {self._error}") from self._error

    def end(self) -> None:
        """Let it go."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._over:
                self.side.train(self._stepped)
                self._error = RuntimeError("it ended before its last turn")
        except OverError:
            return
        except BaseException as error:
            self._error = error
        self._done.release()

    def _stepped(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._over:
            raise OverError


def take_turns(sides: Sequence[Side], *, rounds: int, until: float, least: int = 3, device: torch.device) -> None:
    """Let each side take its warm-up step, then measured ones in turn, until their ratios are known well.

    Args:
        sides: who takes part.
        rounds: at most.
        until: value of time.monotonic after which no further round begins, once there are `least`.
        least: rounds that are measured in any case; they do where they agree.
        device: CPU seconds of the process are measured on a CPU; wall seconds on a GPU, after it is idle.
    """
    players = [_Player(side) for side in sides]
    try:
        for player in players:
            player.turn()
        for done in range(rounds):
            playing = [player.side for player in players]
            if done >= least and (time.monotonic() > until or _agree(playing)):
                break
            for player in players:
                gc.collect()
                before = now(device)
                player.turn()
                player.side.seconds.append(now(device) - before)
            for player in _slower(players):
                players.remove(player)
                player.end()
    finally:
        for player in players:
            player.end()


def _slower(players: Sequence[_Player]) -> list[_Player]:
    """Those that another way to run the same trainer has outrun."""
    ways: dict[str, list[_Player]] = {}
    for player in players:
        ways.setdefault(player.side.of or player.side.name, []).append(player)
    by_time = [sorted(several, key=lambda player: player.side.seconds[-1]) for several in ways.values()]
    return [player for several in by_time for player in several[1:]]


def _agree(sides: Sequence[Side]) -> bool:
    """Whether the rounds gave nearly the same ratios to the first side."""
    for side in sides[1:]:
        ratios = [theirs / ours for theirs, ours in zip(side.seconds, sides[0].seconds, strict=True)]
        if max(ratios) > AGREEING * min(ratios):
            return False
    return True


def fits(side: Side, device: torch.device) -> bool:
    """Whether one step of it goes into the GPU's memory."""
    try:
        take_turns([side], rounds=0, until=0.0, device=device)
    except RuntimeError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def now(device: torch.device) -> float:
    """Seconds of this process's CPU time; on a GPU, of the wall once it is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
