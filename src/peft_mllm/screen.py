"""What a person sees while work goes on: notes, tables, and one progress bar with the time left.

On a terminal the bar moves; elsewhere (a log file) it says where it is every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from peft_mllm.anatomy import Part

QUIET_SECONDS = 20.0
"""Between two lines of progress where there is no terminal."""


NOTHING: Mapping[str, str] = MappingProxyType({})


class Bar:
    """A progress bar, advanced by whoever works."""

    def __init__(self, screen: Screen, progress: Progress, task: TaskID, total: int):
        self._screen, self._progress, self._task, self._total = screen, progress, task, total
        self._done, self._said = 0, time.monotonic()
        self._facts: dict[str, str] = {}

    def advance(
        self, by: int = 1, *, to: int | None = None, total: int | None = None, facts: Mapping[str, str] = NOTHING
    ) -> None:
        """Move on, and show facts such as the loss beside the bar; a fact stays until it is told anew."""
        self._done = self._done + by if to is None else to
        if total is not None:
            self._total = total
            self._progress.update(self._task, total=total)
        self._facts |= facts
        said = ", ".join(f"{name} {value}" for name, value in self._facts.items())
        self._progress.update(self._task, completed=min(self._done, self._total), facts=said)
        if not self._screen.console.is_terminal and time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            title = self._progress.tasks[self._task].description
            self._screen.note(f"{title}: {self._done} of {self._total} {said}")


class Screen:
    """Where a run talks to a person; `quiet` says nothing (other processes, or a caller's wish)."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line of text."""
        self.console.print(text, markup=False)

    def parts(self, rows: list[tuple[Part, int, int, float]]) -> None:
        """What trains: part, its trained and all its parameters, and its peak learning rate."""
        table = Table(title="What trains", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("part")
        for heading in ("parameters", "of the part", "learning rate"):
            table.add_column(heading, justify="right")
        for part, count, total, rate in rows:
            table.add_row(part, f"{count:,}", f"{100 * count / total:.3g} %", f"{rate:g}")
        self.console.print(table)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar from 0 to `total`."""
        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        live = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, transient=True, disable=not live) as progress:
            yield Bar(self, progress, progress.add_task(title, total=total, facts=""), total)
