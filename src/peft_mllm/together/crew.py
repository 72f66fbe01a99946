"""Several pieces of work in one process that take turns, and meet where what they ask for is computed at once.

Each runs in a thread of its own, but only one runs at any moment: it goes on until it meets the others, or ends. When
all that are left wait, what they ask for is computed in the main thread, and they go on in their order. So nothing
depends on chance, and what is global in a process (the state of torch's generator) is nobody else's between two
meetings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Given = TypeVar("Given")
Outcome = TypeVar("Outcome")


@dataclass
class Member(Generic[Asked, Given]):
    """One of a crew.

    Attributes:
        seconds: that it took so far: its own, and its part of what was computed at once.
    """

    seconds: float = 0.0
    _asked: Asked | None = None
    _given: Given | BaseException | None = None
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _since: float = 0.0
    _ended: bool = False

    def meet(self, asked: Asked) -> Given:
        """Wait for the others; then what was asked for, or its error."""
        self._asked = asked
        self._pause()
        self._asked, given, self._given = None, self._given, None
        if isinstance(given, BaseException):
            raise given
        return given  # type: ignore[return-value]  # the crew answers each that asked

    def clock(self) -> float:
        """Seconds that it has taken."""
        return self.seconds + time.monotonic() - self._since

    def _pause(self) -> None:
        self.seconds += time.monotonic() - self._since
        self._stopped.release()
        self._go.acquire()
        self._since = time.monotonic()

    def _continue(self) -> None:
        """In the main thread: let it run until it waits or ends."""
        self._go.release()
        self._stopped.acquire()


@dataclass(frozen=True)
class Crew(Generic[Asked, Given]):
    """Those who take turns.

    Attributes:
        compute: what was asked for to what is given, or an error, each in its order.
        weigh: how much of the time of a computation an asker is to bear, in any unit.
    """

    compute: Callable[[Sequence[Asked]], Sequence[Given | BaseException]]
    weigh: Callable[[Asked], float]

    def work(self, tasks: Sequence[Callable[[Member[Asked, Given]], Outcome]]) -> list[Outcome | BaseException]:
        """Do all tasks; what each returned or raised."""
        outcomes: list[Outcome | BaseException] = [RuntimeError("it has not begun")] * len(tasks)
        members: list[Member[Asked, Given]] = [Member() for _ in tasks]

        def live(number: int) -> None:
            member = members[number]
            member._go.acquire()
            member._since = time.monotonic()
            try:
                outcomes[number] = tasks[number](member)
            except BaseException as error:  # it is the task's, and told to who gave it
                outcomes[number] = error
            member._ended = True
            member._stopped.release()

        threads = [threading.Thread(target=live, args=(number,), daemon=True) for number in range(len(tasks))]
        for thread in threads:
            thread.start()
        left = members
        while left:
            for member in left:
                member._continue()
            left = [member for member in left if not member._ended]
            if left:
                self._answer(left)
        return outcomes

    def _answer(self, members: Sequence[Member[Asked, Given]]) -> None:
        began = time.monotonic()
        asked = [member._asked for member in members]
        given = self.compute(asked)  # type: ignore[arg-type]  # each that waits has asked
        took = time.monotonic() - began
        weights = [self.weigh(each) for each in asked]  # type: ignore[arg-type]
        for member, one, weight in zip(members, given, weights, strict=True):
            member._given = one
            member.seconds += took * weight / sum(weights)
