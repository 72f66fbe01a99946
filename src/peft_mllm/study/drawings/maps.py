"""Figures over two measures: size against stability, what one task does to another, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from peft_mllm.study import wording
from peft_mllm.study.analysis import Front, Line, Transfer
from peft_mllm.study.drawings.canvas import INK, Drawing
from peft_mllm.study.drawings.rows import grouped
from peft_mllm.study.drawings.scales import Scale, scale_of, written
from peft_mllm.study.drawings.sheets import PANELS, Margins, Panel, Sheet, room_for, short
from peft_mllm.study.measures import MEASURES, Measure
from peft_mllm.study.view import View, among, capped

BETTER, WORSE, UNKNOWN = "#2f7fd1", "#d95f1e", "#8a8f98"
WRITTEN = 9
"""With more tasks than this the cells of a transfer map have no figures in them."""
MOST_TASKS = 24


def stability(view: View) -> Drawing | None:
    """Standard deviation over seeds by trainable parameters."""
    contrast = view.analysis.contrast
    lines = [
        line
        for line in view.analysis.lines
        if line.sd is not None and line.figures.get("trainable") and view.trained(line)
    ]
    if not lines:
        return None
    groups = grouped(lines, lambda line: line.factors.get(contrast, ""))
    looks = {level: view.look({contrast: level}) for level in groups}
    sheet = Sheet(1, columns=1, heights=[3.3], margins=Margins(left=0.6, top=0.1), legend=view.legend(groups))
    (panel,) = sheet.panels
    panel.x = scale_of((line.figures["trainable"] for line in lines), logarithmic=True)
    panel.y = scale_of((line.sd or 0.0 for line in lines), zero=True)
    panel.along("trainable parameters", most=6)
    panel.upward(f"SD over seeds{view.in_points}")
    for level, some in groups.items():
        for line in some:
            panel.mark(line.figures["trainable"], line.sd or 0.0, looks[level], filled=False, size=4)
        for alike in grouped(some, lambda line: view.title(line.factors, without=["task", "size"])).values():
            sizes = grouped(alike, lambda line: line.factors.get("size", ""))
            middles = sorted((_middle(each, "trainable"), _middle(each, "sd")) for each in sizes.values())
            panel.line([size for size, _ in middles], [sd for _, sd in middles], looks[level].colour, width=1.3)
            for size, sd in middles:
                panel.mark(size, sd, looks[level], size=7.5)
    return Drawing(
        "stability",
        "Size against stability",
        "Standard deviation of the score over seeds by trainable parameters. Open: each line of the overview; filled: "
        "its median over tasks, joined where a method has several sizes.",
        sheet.figure(),
    )


def _middle(lines: Sequence[Line], name: str) -> float:
    return median(value for line in lines if (value := MEASURES[name].of(line)) is not None)


def transfer_maps(view: View) -> Drawing | None:
    """What training on one task does to another, by method."""
    final = final_transfers(view)
    if not final:
        return None
    groups = grouped(final, lambda each: view.title(each.factors, without=["task"]) or "all")
    sources, targets = axes_of_transfers(view, final)
    sources, targets = sources[:MOST_TASKS], targets[:MOST_TASKS]
    shown = list(groups.items())[:PANELS]
    columns = 2 if len(targets) <= 6 else 1
    below = 0.3 + 0.68 * (room_for((short(name, 14) for name in targets), 14) - 0.22)
    margins = Margins(left=room_for(sources, 18), bottom=below)
    height = max(2, len(sources)) * 0.32 + margins.bottom + margins.top
    sheet = Sheet(len(shown), columns=columns, heights=[height], margins=margins)
    scale = max((abs(each.change) for each in final if each.change is not None), default=0.0) or 1.0
    own = {(view.title(line.factors, without=["task"]) or "all", line.factors.get("task")): line
           for line in view.analysis.lines if view.trained(line)}  # fmt: skip
    for panel, (title, some) in zip(sheet.panels, shown, strict=True):
        _map(panel, some, sources, targets, scale)
        _diagonal(panel, [own.get((title, source)) for source in sources], sources, targets)
        panel.title(title)
    changes = any(each.change is not None for each in final)
    meaning = "Blue is better than zero-shot, orange worse." if changes else ""
    told = capped(len(groups), PANELS, "maps", "tables/transfers")
    what = "Score on the task of the column after training on that of the row; bold: on that task itself."
    return Drawing(
        "transfer",
        "From task to task",
        f"{what} {meaning} {told}".strip(),
        sheet.figure(),
    )


def final_transfers(view: View) -> list[Transfer]:
    """Of the final adapter, or of the best point where the final one was not scored."""
    final = [each for each in view.analysis.transfers if each.point is None]
    return final or [each for each in view.analysis.transfers if each.point == 0]


def axes_of_transfers(view: View, transfers: Sequence[Transfer]) -> tuple[list[str], list[str]]:
    """Sources and targets, in the study's order."""
    order = list(dict.fromkeys([*view.analysis.axes.get("task", ()), *sorted({each.target for each in transfers})]))
    return among(order, (each.source for each in transfers)), among(order, (each.target for each in transfers))


def _map(panel: Panel, some: Sequence[Transfer], sources: Sequence[str], targets: Sequence[str], scale: float) -> None:
    panel.x, panel.y = Scale(-0.5, len(targets) - 0.5), Scale(len(sources) - 0.5, -0.5)
    for each in some:
        if each.source not in sources or each.target not in targets:
            continue
        x, y = targets.index(each.target), sources.index(each.source)
        corners = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
        colour, alpha = _shade(each.change, scale)
        panel.sheet.area([panel.at(x + a, y + b) for a, b in corners], colour, alpha=alpha)
        if len(targets) <= WRITTEN:
            panel.sheet.text(*panel.at(x, y), wording.figure(each.value.value), across="center", size=8)
    for y, name in enumerate(sources):
        panel.sheet.text(panel.left - 0.08, panel.at(0, y)[1], short(name, 18), across="right")
    for x, name in enumerate(targets):
        left = panel.at(x, 0)[0] + 0.05
        panel.sheet.text(left, panel.bottom - 0.08, short(name, 14), across="right", up="top", turned=40)


def _diagonal(panel: Panel, lines: Sequence[Line | None], sources: Sequence[str], targets: Sequence[str]) -> None:
    """What was reached on the trained task itself."""
    for y, (source, line) in enumerate(zip(sources, lines, strict=True)):
        if line and line.score and source in targets and len(targets) <= WRITTEN:
            place = panel.at(targets.index(source), y)
            panel.sheet.text(*place, wording.figure(line.score.value), across="center", size=8, bold=True)


def _shade(change: float | None, scale: float) -> tuple[str, float]:
    """Colour and opacity."""
    if change is None:
        return UNKNOWN, 0.15
    return (BETTER if change >= 0 else WORSE), min(1.0, 0.05 + 0.7 * abs(change) / scale)


def pareto_plot(view: View) -> Drawing | None:
    """The first fronts: what no other line beats in both measures."""
    fronts = [front for front in view.analysis.fronts if front.x in MEASURES and front.y in MEASURES]
    shown = [some[0] for some in grouped(fronts, lambda front: (front.x, front.y)).values()][:PANELS]
    if not shown:
        return None
    contrast = view.analysis.contrast
    blocks = {tuple(sorted(block.factors.items())): view.members(block) for block in view.analysis.blocks}
    found = [blocks.get(tuple(sorted(front.factors.items())), list(view.analysis.lines)) for front in shown]
    places = [[line for line in lines if view.trained(line)] for lines in found]
    levels = dict.fromkeys(line.factors.get(contrast, "") for lines in places for line in lines)
    sheet = Sheet(
        len(shown),
        columns=3,
        heights=[2.35],
        margins=Margins(left=0.68, right=0.18),
        legend=view.legend(levels),
    )
    for panel, front, lines in zip(sheet.panels, shown, places, strict=True):
        _front(panel, view, front, lines)
        panel.title(view.title(front.factors))
    more = len(fronts) > len(shown)
    told = "Of each pair of measures the first block is shown; tables/fronts has all." if more else ""
    return Drawing(
        "pareto",
        "What a better score costs",
        f"The line joins what no other line of the block beats in both measures. {told}".strip(),
        sheet.figure(),
    )


def _front(panel: Panel, view: View, front: Front, lines: Sequence[Line]) -> None:
    across, up = MEASURES[front.x], MEASURES[front.y]
    points = [(across.of(line), up.of(line), view.look(line.factors)) for line in lines]
    known = [(x, y, look) for x, y, look in points if x is not None and y is not None]
    panel.x = scale_of((x for x, _, _ in known), logarithmic=across.logarithmic, room=0.1)
    panel.y = scale_of((y for _, y, _ in known), logarithmic=up.logarithmic, room=0.1)
    panel.along(short(across.title(view.unit), 32), most=3, write=_tick(across))
    panel.upward(short(up.title(view.unit), 26), write=_tick(up))
    ends = [(across.of(view.analysis.lines[place]), up.of(view.analysis.lines[place])) for place in front.lines]
    path = sorted((x, y) for x, y in ends if x is not None and y is not None)
    if len(path) > 1:
        panel.line([x for x, _ in path], [y for _, y in path], INK, width=0.9, alpha=0.5)
    for x, y, look in known:
        panel.mark(x, y, look)


def _tick(measure: Measure) -> Callable[[float], str]:
    """Bytes and seconds with their unit; of a score the axis' title has it."""
    units = {"bytes": lambda value: f"{written(value)}B", "s": _time}
    return units.get(measure.unit, written)


def _time(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
