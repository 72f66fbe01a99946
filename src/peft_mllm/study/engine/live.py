"""What a person sees of a study while it runs: its runs, how they go, and how long the rest will take.

On a terminal a table that is drawn anew; elsewhere (a log file) a line for each run that ended, and a summary from
time to time.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peft_mllm.screen import QUIET_SECONDS
from peft_mllm.study.engine.jobs import Job
from peft_mllm.study.engine.standing import Standing, progress
from peft_mllm.study.wording import duration

DRAW_SECONDS = 0.5
"""Between two drawings: each reads two small files of every run that is under way."""
MOST_LINES = 16
"""Runs in the table; of more, so many are only counted."""
ENDINGS = 3
"""Runs that ended last, below the table."""


@dataclass(frozen=True)
class Board:
    """A study at one moment.

    Attributes:
        engine: what runs it, in words.
        expected: all runs of the study.
        done: have a verified result.
        set_aside: are not tried again.
        elsewhere: are held by other processes.
        slots: runs at once.
        running: jobs under way.
        left: seconds that the rest will take; None where nothing says so yet.
    """

    engine: str
    expected: int
    done: int
    set_aside: int
    elsewhere: int
    slots: int
    running: Sequence[Job]
    left: float | None


class View(ABC):
    """Told what happens, and shows it or not."""

    @abstractmethod
    def show(self, board: Board) -> None:
        """How the study stands now; called often."""

    @abstractmethod
    def ended(self, title: str, how: str) -> None:
        """A run ended: `done in 12 s`, or what was wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left on the screen but what was said."""
        return


class QuietView(View):
    """Shows nothing."""

    def show(self, board: Board) -> None:
        """Not shown."""

    def ended(self, title: str, how: str) -> None:
        """Not shown."""


class LineView(View):
    """Lines, for a log file."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, time.monotonic()

    def show(self, board: Board) -> None:
        """A summary, if the last one is some time ago."""
        if time.monotonic() - self._said < QUIET_SECONDS:
            return
        self._said = time.monotonic()
        first = "; ".join(in_words(progress(job)) for job in board.running[:ENDINGS])
        self._console.print(f"{summary(board)}{': ' if first else ''}{first}", markup=False, soft_wrap=True)

    def ended(self, title: str, how: str) -> None:
        """One line."""
        self._console.print(f"{title}: {how}", markup=False, soft_wrap=True)


class LiveView(View):
    """A table that is drawn anew, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._last: list[str] = []

    def show(self, board: Board) -> None:
        """Draw, if the last time is some time ago."""
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(drawing(board, self._last), refresh=True)

    def ended(self, title: str, how: str) -> None:
        """Keep it among the last endings; what went wrong stays on the screen."""
        self._last = [*self._last, f"{title}: {how}"][-ENDINGS:]
        if not how.startswith("done"):
            self._console.print(f"{title}: {how}", markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def view_for(console: Console) -> View:
    """The view that a console can show."""
    if console.quiet:
        return QuietView()
    return LiveView(console) if console.is_terminal else LineView(console)


def drawing(board: Board, last: Sequence[str]) -> RenderableType:
    """The board as a table of runs, a bar, and the last endings."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(board.running))
    table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("does", overflow="ellipsis", no_wrap=True)
    for heading in ("step", "loss", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in board.running[:MOST_LINES]:
        table.add_row(*map(Text, _cells(progress(job))))  # a title is no markup
    if len(board.running) > MOST_LINES:
        table.add_row(f"and {len(board.running) - MOST_LINES} more")
    ended = board.done + board.set_aside
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(ProgressBar(total=max(1, board.expected), completed=ended, width=28), Text(summary(board)))
    return Group(table, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in last), bar)


def summary(board: Board) -> str:
    """`34 of 96 done, 1 set aside, 2 running, about 12 min left`."""
    parts = [f"{board.done} of {board.expected} done"]
    parts += [f"{board.set_aside} set aside"] if board.set_aside else []
    parts.append(f"{len(board.running)} running ({board.engine})")
    parts += [f"{board.elsewhere} held by other processes"] if board.elsewhere else []
    parts += [f"about {duration(board.left)} left"] if board.left else []
    return ", ".join(parts)


def in_words(run: Standing) -> str:
    """`lora seed 1 (training, step 12 of 60, loss 1.234)`."""
    _, does, step, loss, speed = _cells(run)
    facts = [does, step and f"step {step}", loss and f"loss {loss}", speed and f"{speed} tokens/s"]
    return f"{run.title} ({', '.join(filter(None, facts))})"


def _cells(run: Standing) -> tuple[str, str, str, str, str]:
    of = f" of {run.total}" if run.total else ""
    return (
        run.title,
        run.stage or ("starting" if run.state in ("waiting", "running") else "going on"),
        f"{run.step}{of}" if run.step is not None else "",
        f"{run.loss:.3f}" if run.loss is not None else "",
        f"{run.tokens_per_second:,.0f}" if run.tokens_per_second is not None else "",
    )
