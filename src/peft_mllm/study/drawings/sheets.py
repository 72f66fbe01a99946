"""A sheet of panels in inches, on one pair of matplotlib's axes that fills it.

matplotlib's own axes cost tens of milliseconds each, most of it for ticks that a report does not need; here all lines
of a sheet are one collection and all places are known without measuring. matplotlib is imported when a sheet is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_mllm.study.drawings.canvas import INK
from peft_mllm.study.drawings.looks import BARE, Look
from peft_mllm.study.drawings.scales import Scale, written
from peft_mllm.study.statistics import Estimate

WIDTH = 7.4
"""Inches of a sheet."""
LETTER = 0.069
"""Inches of a letter of `SMALL` text, on average."""
WIDE = 0.073
"""And of a bold one."""
SMALL = 8.5
"""Points of text."""
LONGEST = 32
"""Letters of a name in a legend."""
PANELS = 6
"""Small multiples of one figure; more of them are not looked at."""
DASHED = (0.0, (4.0, 3.0))
SOLID = (0.0, None)
UNIT = Scale(0.0, 1.0)


@dataclass(frozen=True)
class Margins:
    """Room around a panel, in inches."""

    left: float = 0.55
    right: float = 0.2
    bottom: float = 0.48
    top: float = 0.34


class Sheet:
    """A sheet that takes lines, areas, marks and texts in inches, and becomes a figure."""

    def __init__(
        self,
        count: int,
        *,
        columns: int,
        heights: Sequence[float],
        margins: Margins,
        legend: Sequence[tuple[str, Look]] = (),
    ):
        """Lay out panels row by row.

        Args:
            count: of panels.
            columns: at most so many beside one another.
            heights: of each row with its margins; the last holds for all that follow.
            margins: around each.
            legend: names and looks at the head.
        """
        columns = max(1, min(columns, count))
        rows = [heights[min(row, len(heights) - 1)] for row in range(-(-count // columns))]
        flow = _flow([name for name, _ in legend])
        head = 0.29 + 0.21 * flow[-1][1] if flow else 0.0
        self.height = head + sum(rows)
        self.across = WIDTH / columns
        self._lines: list[tuple[Sequence[tuple[float, float]], str, float, float, Any]] = []
        self._areas: list[tuple[Sequence[tuple[float, float]], Any]] = []
        self._marks: dict[tuple[str, str, bool, float], list[tuple[float, float]]] = {}
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self.panels = []
        for place in range(count):
            row, column = divmod(place, columns)
            low = self.height - head - sum(rows[: row + 1])
            left = column * self.across + margins.left
            width = max(self.across - margins.left - margins.right, 0.3)
            height = rows[row] - margins.bottom - margins.top
            self.panels.append(Panel(self, left, low + margins.bottom, width, height, margins))
        for (name, look), (x, row) in zip(legend, flow, strict=True):
            y = self.height - 0.12 - 0.21 * row
            self.mark(x, y, look)
            self.text(x + 0.11, y, short(name, LONGEST))

    def line(
        self,
        points: Sequence[tuple[float, float]],
        colour: str,
        *,
        width: float = 1.0,
        alpha: float = 1.0,
        style: Any = SOLID,
    ) -> None:
        """A line through points."""
        self._lines.append((points, colour, width, alpha, style))

    def area(self, points: Sequence[tuple[float, float]], colour: str, *, alpha: float) -> None:
        """A filled area."""
        from matplotlib.colors import to_rgba

        self._areas.append((points, to_rgba(colour, alpha)))

    def mark(self, x: float, y: float, look: Look, *, filled: bool = True, size: float = 6.0) -> None:
        """A method's marker."""
        self._marks.setdefault((look.marker, look.colour, filled, size), []).append((x, y))

    def text(self, x: float, y: float, text: str, *, size: float = SMALL, across: str = "left", up: str = "center",
             bold: bool = False, turned: float = 0.0) -> None:  # fmt: skip
        """A line of text."""
        kind = {"fontsize": size, "ha": across, "va": up, "fontweight": "bold" if bold else "normal"}
        if turned:
            kind |= {"rotation": turned, "rotation_mode": "anchor"}
        self._texts.append((x, y, text, kind))

    def figure(self) -> Any:
        """Everything as matplotlib's figure."""
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.colors import to_rgba
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, self.height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, WIDTH), ylim=(0, self.height))
        axes.add_collection(PolyCollection([p for p, _ in self._areas], facecolors=[c for _, c in self._areas],
                                           edgecolors="none", zorder=1), autolim=False)  # fmt: skip
        points, colours, widths, alphas, styles = zip(*self._lines, strict=True) if self._lines else ([],) * 5
        shades = [to_rgba(colour, alpha) for colour, alpha in zip(colours, alphas, strict=True)]
        axes.add_collection(
            LineCollection(points, colors=shades, linewidths=widths, linestyles=styles, zorder=2), autolim=False
        )
        for (marker, colour, filled, size), places in self._marks.items():
            axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=size, zorder=3, clip_on=False,
                      markerfacecolor=colour if filled else "none", scalex=False, scaley=False)  # fmt: skip
        for x, y, text, kind in self._texts:
            axes.text(x, y, text, zorder=4, **kind)
        return figure


@dataclass
class Panel:
    """A rectangle of the sheet with two scales."""

    sheet: Sheet
    left: float
    bottom: float
    width: float
    height: float
    margins: Margins
    x: Scale = UNIT
    y: Scale = UNIT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where values lie, in inches."""
        return self.left + self.width * self.x.place(x), self.bottom + self.height * self.y.place(y)

    def title(self, text: str) -> None:
        """Above it, flush with what stands at its left."""
        if text:
            room = self.width + self.margins.left + self.margins.right - 0.1
            top = self.bottom + self.height + 0.16
            left = self.left - self.margins.left + 0.05
            self.sheet.text(left, top, short(text, int(room / WIDE)), size=SMALL, bold=True)

    def along(self, title: str, *, ticks: Sequence[tuple[float, str]] | None = None, most: int = 5,
              write: Callable[[float], str] = written) -> None:  # fmt: skip
        """Ticks, grid and title of the horizontal axis."""
        low, high = self.bottom, self.bottom + self.height
        self.sheet.line([(self.left, low), (self.left + self.width, low)], INK, width=0.6)
        for value, text in ticks if ticks is not None else [(value, write(value)) for value in self.x.ticks(most)]:
            x = self.left + self.width * self.x.place(value)
            self.sheet.line([(x, low), (x, high)], INK, width=0.6, alpha=0.1)
            self.sheet.text(x, low - 0.06, text, across="center", up="top")
        self.sheet.text(self.left + self.width / 2, low - 0.24, title, across="center", up="top")

    def upward(self, title: str, *, most: int = 4, write: Callable[[float], str] = written) -> None:
        """Ticks, grid and title of the vertical axis."""
        self.sheet.line([(self.left, self.bottom), (self.left, self.bottom + self.height)], INK, width=0.6)
        for value in self.y.ticks(most):
            y = self.bottom + self.height * self.y.place(value)
            self.sheet.line([(self.left, y), (self.left + self.width, y)], INK, width=0.6, alpha=0.1)
            self.sheet.text(self.left - 0.06, y, write(value), across="right")
        middle = self.bottom + self.height / 2
        self.sheet.text(self.left - self.margins.left + 0.13, middle, title, across="center", turned=90)

    def line(self, xs: Iterable[float], ys: Iterable[float], colour: str, **kind: Any) -> None:
        """Through values."""
        self.sheet.line([self.at(x, y) for x, y in zip(xs, ys, strict=True)], colour, **kind)

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: str, *, alpha: float
    ) -> None:
        """Between two lines."""
        there = [self.at(x, y) for x, y in zip(xs, lows, strict=True)]
        back = [self.at(x, y) for x, y in zip(xs, highs, strict=True)]
        self.sheet.area([*there, *reversed(back)], colour, alpha=alpha)

    def mark(self, x: float, y: float, look: Look, **kind: Any) -> None:
        """At values."""
        self.sheet.mark(*self.at(x, y), look, **kind)

    def upright(self, value: float, *, colour: str, style: Any = SOLID, width: float = 0.9, alpha: float = 1.0) -> None:
        """A line across the panel at a value of the horizontal axis."""
        x = self.left + self.width * self.x.place(value)
        points = [(x, self.bottom), (x, self.bottom + self.height)]
        self.sheet.line(points, colour, width=width, alpha=alpha, style=style)

    def start(self, value: Estimate) -> None:
        """Zero-shot on the horizontal axis, with its interval."""
        self.upright(value.value, colour=BARE.colour, style=DASHED, width=1.2)
        if value.low is not None and value.high is not None:
            low, high = (self.left + self.width * self.x.place(limit) for limit in (value.low, value.high))
            corners = [(low, self.bottom), (high, self.bottom)]
            self.sheet.area([*corners, *((x, self.bottom + self.height) for x, _ in reversed(corners))], BARE.colour,
                            alpha=0.12)  # fmt: skip


def _flow(names: Sequence[str]) -> list[tuple[float, int]]:
    """Of each entry of a legend its place across, and its row."""
    places, x, row = [], 0.1, 0
    for name in names:
        width = 0.32 + LETTER * min(len(name), LONGEST)
        if x > 0.1 and x + width > WIDTH:
            x, row = 0.1, row + 1
        places.append((x, row))
        x += width
    return places


def short(name: str, longest: int) -> str:
    """Cut a long name in its middle: beginnings and ends both tell names apart."""
    if len(name) <= longest:
        return name
    head = max(1, (longest - 1) // 2)
    return f"{name[:head]}…{name[len(name) - max(1, longest - 1 - head) :]}"


def room_for(names: Iterable[str], longest: int) -> float:
    """Inches that names take."""
    width = min(longest, max((len(name) for name in names), default=0))
    return 0.22 + LETTER * width if width else 0.0
