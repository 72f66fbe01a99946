"""The report's figures, as SVG that takes the page's colour and font, for light and dark alike."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from peft_mllm.study import wording
from peft_mllm.study.compare import Comparison
from peft_mllm.study.drawings.canvas import INK, house_style, page_svg
from peft_mllm.study.drawings.looks import NEUTRAL, Look
from peft_mllm.study.labels import Box, place_beside, spread
from peft_mllm.study.results import Point, Result
from peft_mllm.study.statistics import Estimate

CROWD = 12
"""With more runs than this a figure has no names in it: they would cover it, and the legend tells methods."""
SIZE = (5.2, 3.7)
"""Inches, about a phone's width; the page scales a figure to its column."""


@dataclass(frozen=True)
class Drawn:
    """A finished figure: its heading, what it shows, and the SVG."""

    title: str
    caption: str
    svg: str


def draw_all(results: Sequence[Result], comparison: Comparison, look: Mapping[str, Look]) -> list[Drawn]:
    """Every figure that these results have the data for."""
    return [
        drawn
        for drawn in (
            gain_against_forgotten(comparison, look),
            score_against_size(comparison, look),
            learning_curves(results, look),
            training_time(comparison, look),
        )
        if drawn
    ]


def gain_against_forgotten(comparison: Comparison, look: Mapping[str, Look]) -> Drawn | None:
    """What was won on the new task, against what it cost in the seen ones: up and left is better."""
    points = [(row, row.forgotten, row.gain) for row in comparison.trained if row.forgotten and row.gain]
    if not points:
        return None

    def paint(axes: Any) -> None:
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
        for row, lost, won in points:
            _dot(axes, look[row.method], lost, won)
        axes.set_xlabel(f"forgotten on the seen tasks{_in_unit(comparison)}")
        axes.set_ylabel(f"gained on {comparison.task}{_in_unit(comparison)}")
        axes.margins(x=0.18, y=0.12)
        axes.figure.canvas.draw()  # settles the axes, so that places on paper are known
        _name_points(axes, [(row.run, lost, won) for row, lost, won in points])

    return Drawn(
        "Gain against forgetting",
        f"Up is better on the new task, left keeps more of the seen ones. Bars: 95{wording.GLUE}% intervals.",
        _svg(paint, "gain", f"Gain on {comparison.task} against what was forgotten on the seen tasks"),
    )


def score_against_size(comparison: Comparison, look: Mapping[str, Look]) -> Drawn | None:
    """What more trainable parameters buy."""
    points = [(row, row.score) for row in comparison.trained if row.score and row.trainable]
    if not points:
        return None
    start = next((row.score for row in comparison.rows if row.zero_shot and row.score), None)

    def paint(axes: Any) -> None:
        axes.set_xscale("log")
        if start:
            _baseline(axes, start)
        for row, score in points:
            _dot(axes, look[row.method], Estimate(row.trainable), score)
        axes.xaxis.set_major_formatter(lambda value, _: wording.count(round(value)).replace(".0", ""))
        axes.minorticks_off()
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel(f"score on {comparison.task}{_in_unit(comparison)}")
        axes.margins(x=0.18, y=0.12)
        axes.figure.canvas.draw()
        _name_points(axes, [(row.run, Estimate(row.trainable), score) for row, score in points])

    dashed = " Dashed: zero-shot." if start else ""
    return Drawn(
        "Score against size",
        f"Trainable parameters on a logarithmic axis. Bars: 95{wording.GLUE}% intervals.{dashed}",
        _svg(paint, "size", f"Score on {comparison.task} against trainable parameters"),
    )


def learning_curves(results: Sequence[Result], look: Mapping[str, Look]) -> Drawn | None:
    """Loss by step: faint as logged, strong as a running mean; dots are evaluations."""
    curves = [(result, _finite(result.points, "loss")) for result in results]
    curves = [(result, curve) for result, curve in curves if len(curve) > 1]
    if not curves:
        return None

    def paint(axes: Any) -> None:
        for result, curve in curves:
            _curve(axes, look[result.method.name], curve, _finite(result.points, "eval_loss"))
        if _spread([loss for _, curve in curves for _, loss in curve]) > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        ends = [(result.name, curve[-1][0], _smooth(curve)[-1][1]) for result, curve in curves]
        axes.figure.canvas.draw()
        _name_ends(axes, ends)

    return Drawn(
        "Learning curves",
        "Loss by step: faint as logged, strong its running mean. Open marks: held-out questions.",
        _svg(paint, "loss", "Training loss by step"),
    )


def training_time(comparison: Comparison, look: Mapping[str, Look]) -> Drawn | None:
    """How long each run trained."""
    rows = [row for row in comparison.rows if row.seconds]
    if not rows:
        return None

    def paint(axes: Any) -> None:
        seconds = [row.seconds for row in rows]
        bars = axes.barh(range(len(rows)), seconds, height=0.42, color=[look[row.method].colour for row in rows])
        axes.bar_label(bars, [wording.duration(value) for value in seconds], padding=5)
        axes.set_yticks(range(len(rows)), [_short(row.run) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, max(seconds) * 1.2)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return Drawn(
        "Training time",
        "Wall-clock time of training, evaluation not included.",
        _svg(paint, "time", "Training time", height=max(SIZE[1], 0.28 * len(rows))),
    )


def _dot(axes: Any, look: Look, x: Estimate, y: Estimate) -> None:
    axes.errorbar(
        x.value,
        y.value,
        xerr=_bars(x),
        yerr=_bars(y),
        fmt=look.marker,
        color=look.colour,
        markersize=7,
        elinewidth=1,
        alpha=0.95,
    )


def _bars(estimate: Estimate) -> list[list[float]] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _baseline(axes: Any, start: Estimate) -> None:
    axes.axhline(start.value, color=NEUTRAL, linewidth=1.2, linestyle=(0, (5, 4)))
    if start.low is not None and start.high is not None:
        axes.axhspan(start.low, start.high, color=NEUTRAL, alpha=0.12, linewidth=0)


def _curve(axes: Any, look: Look, curve: list[tuple[int, float]], evaluations: list[tuple[int, float]]) -> None:
    axes.plot(*zip(*curve, strict=True), color=look.colour, linewidth=0.8, alpha=0.25)
    axes.plot(*zip(*_smooth(curve), strict=True), color=look.colour)
    if evaluations:
        steps, losses = zip(*evaluations, strict=True)
        axes.plot(steps, losses, look.marker, color=look.colour, markerfacecolor="none", markersize=6)


def _finite(points: Sequence[Point], name: str) -> list[tuple[int, float]]:
    pairs = [(point.step, getattr(point, name)) for point in points]
    return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


def _smooth(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A centred running mean over about a twentieth of the curve; centred, so that it does not lag behind."""
    half = max(1, len(curve) // 40)
    windows = ([loss for _, loss in curve[max(0, i - half) : i + half + 1]] for i in range(len(curve)))
    return [(step, sum(window) / len(window)) for (step, _), window in zip(curve, windows, strict=True)]


def _spread(values: Sequence[float]) -> float:
    low = min(values)
    return max(values) / low if low > 0 else 1.0


def _name_points(axes: Any, points: Sequence[tuple[str, Estimate, Estimate]]) -> None:
    """Write each name beside its point, clear of markers and error bars."""
    if len(points) > CROWD:
        return
    names = [_short(name) for name, _, _ in points]
    centres = [_on_paper(axes, x.value, y.value) for _, x, y in points]
    taken = [box for _, x, y in points for box in _covered(axes, x, y)]
    corners = place_beside(names, centres, taken, _frame(axes))
    for name, (_, x, y), centre, corner in zip(names, points, centres, corners, strict=True):
        offset = (corner[0] - centre[0], corner[1] - centre[1])
        axes.annotate(name, (x.value, y.value), xytext=offset, textcoords="offset points")


def _name_ends(axes: Any, ends: Sequence[tuple[str, float, float]]) -> None:
    """Write each name right of its curve's end."""
    if len(ends) > CROWD:
        return
    heights = [_on_paper(axes, x, y)[1] for _, x, y in ends]
    for (name, x, y), height, moved in zip(ends, heights, spread(heights), strict=True):
        offset = (9, moved - height)
        axes.annotate(_short(name), (x, y), xytext=offset, textcoords="offset points", va="center")


def _covered(axes: Any, x: Estimate, y: Estimate) -> list[Box]:
    """The boxes of a marker and its two error bars."""
    across, up = _on_paper(axes, x.value, y.value)
    left, low = _on_paper(axes, _or(x.low, x.value), _or(y.low, y.value))
    right, high = _on_paper(axes, _or(x.high, x.value), _or(y.high, y.value))
    marker = Box(across - 5, up - 5, across + 5, up + 5)
    return [marker, Box(left, up - 1, right, up + 1), Box(across - 1, low, across + 1, high)]


def _frame(axes: Any) -> Box:
    bounds, scale = axes.get_window_extent(), 72 / axes.figure.dpi
    return Box(bounds.x0 * scale, bounds.y0 * scale, bounds.x1 * scale, bounds.y1 * scale)


def _on_paper(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Where a value lies, in points of print from the figure's corner."""
    across, up = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
    return float(across), float(up)


def _or(limit: float | None, value: float) -> float:
    return value if limit is None else limit


def _in_unit(comparison: Comparison) -> str:
    return f" ({comparison.unit})" if comparison.unit else ""


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _svg(paint: Callable[[Any], None], key: str, label: str, *, height: float = SIZE[1]) -> str:
    """Draw on one pair of axes and return SVG to stand in a page."""
    text = io.StringIO()
    with house_style():
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return page_svg(text.getvalue(), key, label)
