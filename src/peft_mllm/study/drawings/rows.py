"""Panels of rows: in each a name, a figure with its interval, and a word beside it. Most of a study is drawn so."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peft_mllm.study.drawings.canvas import INK
from peft_mllm.study.drawings.looks import Look
from peft_mllm.study.drawings.scales import Scale, scale_of
from peft_mllm.study.drawings.sheets import Margins, Panel, Sheet, room_for, short
from peft_mllm.study.statistics import Estimate

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

HEIGHT = 0.225
"""Inches of a row."""
BESIDE = 24
"""Letters at the right of a row."""


@dataclass(frozen=True)
class Row:
    """One line of a panel.

    Attributes:
        name: at the left.
        marks: each a figure, and whether its marker is filled.
        beside: at the right.
    """

    name: str
    marks: Sequence[tuple[Estimate, bool]]
    look: Look
    beside: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows over one axis.

    Attributes:
        title: above them; empty where the sheet has one panel that needs none.
        measure: the axis' title.
        start: zero-shot, as a dashed line.
        zero: whether no difference is marked by a line.
        limits: of the axis, where they are given.
    """

    title: str
    measure: str
    rows: Sequence[Row]
    start: Estimate | None = None
    zero: bool = False
    limits: tuple[float, float] | None = None


def draw_rows(groups: Sequence[Rows], *, longest: int = 26) -> Any:
    """A figure of panels, two beside one another; names have at most so many letters."""
    columns = 2 if len(groups) > 1 else 1
    every = [row for group in groups for row in group.rows]
    margins = Margins(
        left=room_for((row.name for row in every), longest),
        right=0.15 + room_for((row.beside for row in every), BESIDE),
        bottom=0.5,
        top=0.32 if any(group.title for group in groups) else 0.08,
    )
    counts = [max(len(group.rows) for group in groups[i : i + columns]) for i in range(0, len(groups), columns)]
    heights = [max(count, 2) * HEIGHT + margins.bottom + margins.top for count in counts]
    sheet = Sheet(len(groups), columns=columns, heights=heights, margins=margins)
    for panel, group in zip(sheet.panels, groups, strict=True):
        _draw(panel, group, longest)
    return sheet.figure()


def _draw(panel: Panel, group: Rows, longest: int) -> None:
    # a panel beside a longer one keeps the distance of rows, and ends earlier
    free = panel.height - max(len(group.rows), 1) * HEIGHT
    panel.bottom, panel.height = panel.bottom + free, panel.height - free
    panel.x = Scale(*group.limits) if group.limits else scale_of(_values(group))
    panel.y = Scale(len(group.rows) - 0.5, -0.5)
    panel.along(group.measure, most=6)
    panel.title(group.title)
    if group.zero:
        panel.upright(0.0, colour=INK, alpha=0.55)
    if group.start:
        panel.start(group.start)
    for y, row in enumerate(group.rows):
        for value, filled in row.marks:
            if value.low is not None and value.high is not None:
                panel.line((value.low, value.high), (y, y), row.look.colour, width=1.6, alpha=0.85)
            panel.mark(value.value, y, row.look, filled=filled)
        _, height = panel.at(panel.x.low, y)
        panel.sheet.text(panel.left - 0.1, height, short(row.name, longest), across="right")
        if row.beside:
            panel.sheet.text(panel.left + panel.width + 0.1, height, short(row.beside, BESIDE))


def _values(group: Rows) -> Iterable[float]:
    for value in [*(value for row in group.rows for value, _ in row.marks), *([group.start] if group.start else [])]:
        yield from (each for each in (value.low, value.value, value.high) if each is not None)
    if group.zero:
        yield 0.0


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
