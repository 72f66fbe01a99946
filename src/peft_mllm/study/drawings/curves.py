"""Figures along something: training steps, what lies after the best point, the size of the data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_mllm.study.analysis import Line
from peft_mllm.study.drawings.canvas import Drawing
from peft_mllm.study.drawings.looks import Look
from peft_mllm.study.drawings.rows import grouped
from peft_mllm.study.drawings.scales import scale_of
from peft_mllm.study.drawings.sheets import DASHED, PANELS, SOLID, Margins, Panel, Sheet
from peft_mllm.study.outcomes import CurvePoint, Outcome
from peft_mllm.study.results import Point
from peft_mllm.study.view import View, capped

COLUMNS = 3
HEIGHT = 2.05
MARGINS = Margins(left=0.52, right=0.2, bottom=0.48, top=0.34)
STEEP = 30.0
"""Losses whose highest is so many times the lowest are drawn on a logarithmic axis."""
CROWD = 4
"""With more curves than this their bands are fainter, or they would be one grey."""
DENSE = 200
"""Points of one curve that a figure of this size can show."""


@dataclass(frozen=True)
class Curve:
    """A line with a band over seeds.

    Attributes:
        low, high: the band; equal to `y` where there is one seed.
        dashed: of what is beside the matter.
        smooth: drawn without markers.
    """

    name: str
    look: Look
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    dashed: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart: title, axes' titles, curves, and ticks where they are given; a steep one may be logarithmic."""

    title: str
    along: str
    upward: str
    curves: Sequence[Curve]
    ticks: Sequence[tuple[float, str]] = ()
    steep: bool = False


def loss_curves(view: View) -> Drawing | None:
    """Training loss by step: mean over seeds, with the band from the lowest seed to the highest."""
    return _over_blocks(
        view,
        lambda lines: [curve for line in lines for curve in _losses(view, line)],
        key="curves",
        title="Learning curves",
        caption="Loss by step, a running mean: the line is the mean over seeds, the band reaches from the lowest seed "
        "to the highest. Dashed: loss on held-out questions.",
        along="step",
        upward="loss",
    )


def after_best(view: View) -> Drawing | None:
    """Scores at the point of lowest validation loss and after it."""
    return _over_blocks(
        view,
        lambda lines: [curve for line in lines for curve in _after(view, line)],
        key="after-best",
        title="Training beyond the best point",
        caption="Score by evaluations after the lowest validation loss (0): on the task that was trained, and dashed "
        "the mean of the other tasks. Bands reach from the lowest seed to the highest.",
        along="evaluations after the best",
        upward=f"score{view.in_unit}",
        whole=True,
    )


def hallucination_curves(view: View, measure: Callable[[CurvePoint], float | None]) -> Drawing | None:
    """Hallucination along the same points."""

    def curves(lines: Sequence[Line]) -> list[Curve]:
        made = []
        for line in lines:
            rows = [[measure(point) for point in points] for points in _points_after(view.outcomes(line))]
            curve = _over_seeds(_contrast(view, line), view.look(line.factors), rows)
            made += [curve] if curve else []
        return made

    return _over_blocks(
        view,
        curves,
        key="hallucination-curve",
        title="Hallucination along the training curve",
        caption="By evaluations after the lowest validation loss (0); less is better. Bands reach from the lowest "
        "seed to the highest.",
        along="evaluations after the best",
        upward="hallucination",
        whole=True,
    )


def data_size_curves(view: View) -> Drawing | None:
    """Score by the number of training questions."""
    axis, contrast = "data_size", view.analysis.contrast
    lines = [line for line in view.analysis.lines if line.score and axis in line.factors and view.trained(line)]
    levels = view.labels(axis)
    if len(levels) < 2 or not lines:
        return None
    places = {label: _number(label, place) for place, label in enumerate(levels)}
    panels = grouped(lines, lambda line: view.title(line.factors, without=[axis, contrast]))
    charts = []
    for title, some in list(panels.items())[:PANELS]:
        by_level = grouped(some, lambda line: line.factors.get(contrast, ""))
        curves = [_by_size(level, view.look({contrast: level}), each, places) for level, each in by_level.items()]
        ticks = [(places[label], label) for label in levels]
        charts.append(Chart(title, "training questions", f"score{view.in_unit}", curves, ticks=ticks))
    return Drawing(
        "data-size",
        "More data",
        " ".join(
            filter(
                None,
                [
                    "Score by the size of the training data, on a logarithmic axis. Bands: intervals over seeds and"
                    " questions.",
                    capped(len(panels), PANELS, "panels", "tables/scores"),
                ],
            )
        ),
        _draw(view, charts, logarithmic=all(place > 0 for place in places.values())),
    )


def _by_size(name: str, look: Look, lines: Sequence[Line], places: Mapping[str, float]) -> Curve:
    points = sorted((places[line.factors["data_size"]], line.score) for line in lines if line.score)
    x = np.array([place for place, _ in points])
    y, low, high = (
        np.array([score.value if (limit := getattr(score, side)) is None else limit for _, score in points])
        for side in ("value", "low", "high")
    )
    return Curve(name, look, x, y, low, high)


def _number(label: str, place: int) -> float:
    """`5k`, `1,000`, `10 000`: what a label says, else its place."""
    found = re.fullmatch(r"(\d[\d\s.,]*?)\s*([kKM]?)", label.strip())
    if not found:
        return float(place + 1)
    digits = re.sub(r"[\s,](?=\d{3})", "", found[1]).replace(",", ".")
    return float(digits) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[found[2]]


def _over_blocks(
    view: View,
    curves_of: Callable[[Sequence[Line]], list[Curve]],
    *,
    key: str,
    title: str,
    caption: str,
    along: str,
    upward: str,
    whole: bool = False,
) -> Drawing | None:
    """A panel for each block that has curves; `whole` sets ticks at whole numbers."""
    charts: list[Chart] = []
    there = 0
    for block in view.analysis.blocks:
        lines = view.members(block)
        if not any(view.outcomes(line) for line in lines):
            continue
        if len(charts) < PANELS:
            curves = curves_of(lines)
            if not curves:
                continue
            most = int(max(curve.x.max() for curve in curves))
            ticks = [(float(i), str(i)) for i in range(most + 1)] if whole else []
            charts.append(Chart(view.block_title(block), along, upward, curves, ticks, steep=not whole))
        there += 1
    if not charts:
        return None
    told = capped(there, PANELS, "blocks", "the result files")
    return Drawing(key, title, f"{caption} {told}".strip(), _draw(view, charts))


def _contrast(view: View, line: Line) -> str:
    return line.factors.get(view.analysis.contrast, "")


# --- what is drawn ---


def _losses(view: View, line: Line) -> list[Curve]:
    name, look = _contrast(view, line), view.look(line.factors)
    made = []
    for field, dashed in (("loss", False), ("eval_loss", True)):
        runs = [series for outcome in view.outcomes(line) if len(series := _series(outcome, field)[0]) > 1]
        if not runs:
            continue
        every = [_series(outcome, field) for outcome in view.outcomes(line)]
        steps = every[0][0]
        rows = np.stack([np.interp(steps, x, _smooth(y) if not dashed else y) for x, y in every if len(x) > 1])
        made.append(Curve(name, look, steps, rows.mean(0), rows.min(0), rows.max(0), dashed=dashed, smooth=True))
    return made


def _series(outcome: Outcome, field: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and finite values, thinned to what can be seen."""
    points: Sequence[Point] = outcome.result.points if outcome.result else ()
    pairs = [(point.step, value) for point in points if (value := getattr(point, field)) is not None]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    pairs = pairs[:: max(1, len(pairs) // DENSE)]
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred running mean over about a twentieth; centred, so that it does not lag behind."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    ends, starts = np.minimum(places + half + 1, len(values)), np.maximum(places - half, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _points_after(outcomes: Sequence[Outcome]) -> list[list[CurvePoint]]:
    """Of each run the points from the best on; none where only the best was scored."""
    found = []
    for outcome in outcomes:
        best = next((place for place, point in enumerate(outcome.curve) if point.best), None)
        if best is not None and len(outcome.curve) > best + 1:
            found.append(list(outcome.curve[best:]))
    return found


def _after(view: View, line: Line) -> list[Curve]:
    runs, task = _points_after(view.outcomes(line)), line.factors.get("task", "")
    own = [[point.scores[task].value if task in point.scores else None for point in points] for points in runs]
    others = [[_mean_of_others(point, task) for point in points] for points in runs]
    name, look = _contrast(view, line), view.look(line.factors)
    made = [_over_seeds(name, look, own), _over_seeds(name, look, others, dashed=True)]
    return [curve for curve in made if curve]


def _mean_of_others(point: CurvePoint, task: str) -> float | None:
    values = [answers.value for name, answers in point.scores.items() if name != task]
    return sum(values) / len(values) if values else None


def _over_seeds(name: str, look: Look, runs: Sequence[Sequence[float | None]], *, dashed: bool = False) -> Curve | None:
    """Mean and band at the points that all seeds have."""
    length = min((len(run) for run in runs), default=0)
    rows = [[value for value in run[:length] if value is not None] for run in runs]
    whole = [row for row in rows if len(row) == length]
    if length < 2 or not whole:
        return None
    values = np.array(whole)
    x = np.arange(length, dtype=float)
    return Curve(name, look, x, values.mean(0), values.min(0), values.max(0), dashed=dashed)


# --- drawing ---


def _draw(view: View, charts: Sequence[Chart], *, logarithmic: bool = False) -> Any:
    legend = view.legend(curve.name for each in charts for curve in each.curves)
    columns = min(COLUMNS, len(charts))
    height = HEIGHT if columns == COLUMNS else HEIGHT + 0.5
    sheet = Sheet(len(charts), columns=columns, heights=[height], margins=MARGINS, legend=legend)
    for panel, each in zip(sheet.panels, charts, strict=True):
        panel.x = scale_of((x for curve in each.curves for x in curve.x), logarithmic=logarithmic, room=0.03)
        heights = [float(y) for curve in each.curves for y in (*curve.low, *curve.high, *curve.y)]
        panel.y = scale_of(heights, logarithmic=each.steep and max(heights) > STEEP * min(heights))
        panel.along(each.along, ticks=each.ticks or None, most=4)
        panel.upward(each.upward)
        panel.title(each.title)
        for curve in each.curves:
            _curve(panel, curve, faint=len(each.curves) > CROWD)
    return sheet.figure()


def _curve(panel: Panel, curve: Curve, *, faint: bool) -> None:
    if not curve.dashed and (curve.high > curve.low).any():
        panel.band(
            curve.x.tolist(), curve.low.tolist(), curve.high.tolist(), curve.look.colour, alpha=0.06 if faint else 0.15
        )
    style, width = (DASHED, 1.0) if curve.dashed else (SOLID, 1.6)
    panel.line(curve.x.tolist(), curve.y.tolist(), curve.look.colour, width=width, style=style)
    if not curve.dashed and not curve.smooth:
        for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True):
            panel.mark(x, y, curve.look, size=4.5)
