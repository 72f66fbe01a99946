"""The tables of all lines: scores, which are the same on every day, and costs, which are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_mllm.study.analysis import Block, Line
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.outcomes import NOT_VARIED
from peft_mllm.study.tables.model import Column, Table, measured, score, whole, words
from peft_mllm.study.view import View
from peft_mllm.study.view import words as axis_words

COSTS = ("trainable", "disk", "flops", "flops_paper", "seconds", "seconds_scoring", "memory")


def overview(view: View, lines: Sequence[Line] | None = None) -> Table:
    """Everything that is known of each line."""
    columns = [*_scored(view), *(_cost(name) for name in COSTS)]
    chosen = view.analysis.lines if lines is None else lines
    rows = [[*_scores(view, line), *(line.figures.get(name) for name in COSTS)] for line in chosen]
    return _table(view, "overview", "All lines", columns, chosen, rows)


def scores(view: View) -> Table:
    """What does not depend on the clock or the machine's memory; two studies with equal results give equal rows."""
    columns = [*_scored(view), _cost("trainable"), words("runs", "runs")]
    rows = [[*_scores(view, line), line.figures.get("trainable"), " ".join(line.runs)] for line in view.analysis.lines]
    return _table(view, "scores", "Scores", columns, view.analysis.lines, rows)


def costs(view: View) -> Table:
    """Parameters, bytes, FLOPs, time and memory, means over seeds."""
    axes = _axes(view)
    columns = [*axes, whole("seeds", "seeds"), *(_cost(name) for name in COSTS)]
    rows = [
        [*_labels(view, line), line.seeds, *(line.figures.get(name) for name in COSTS)] for line in view.analysis.lines
    ]
    return _table(view, "costs", "Costs", columns, view.analysis.lines, rows)


def families(view: View) -> list[Table]:
    """The scores of blocks that differ in nothing but the task, side by side: one table for a paper each."""
    contrast = view.analysis.contrast
    groups: dict[str, list[Block]] = {}
    for block in view.analysis.blocks:
        groups.setdefault(view.title(block.factors, without=["task"]), []).append(block)
    return [_family(view, title, blocks, contrast) for title, blocks in groups.items()]


def _family(view: View, title: str, blocks: Sequence[Block], contrast: str) -> Table:
    """Rows are lines' names, columns the blocks' tasks with the spread of each beside it."""
    names: dict[str, list[Any]] = {}
    columns, strong_names = [words("name", axis_words(contrast))], set()
    for at, block in enumerate(blocks):
        task = block.factors.get("task", "") or "score"
        columns += [
            score(f"score{at}", f"{task}{view.in_unit}", spread=f"sd{at}"),
            measured(f"sd{at}", "SD", "{:.1f}".format),
        ]
        group = best_group(view, block)
        for line in view.members(block):
            name = view.name(line, {**block.factors, "task": task})
            names.setdefault(name, [None] * (2 * len(blocks)))[2 * at : 2 * at + 2] = [line.score, line.sd]
            strong_names |= {(name, 2 * at + 1)} if line in group else set()
    order = list(names)
    strong = frozenset((order.index(name), at) for name, at in strong_names)
    caption = "Mean and standard deviation over seeds; bold: the best line and all that cannot be told apart from it."
    rows = [[name, *cells] for name, cells in names.items()]
    return Table("scores", title or view.analysis.title, caption, columns, rows, strong)


def best_group(view: View, block: Block) -> list[Line]:
    """The highest line and those that share a letter with it; none where all do."""
    trained = [line for line in view.members(block) if view.trained(line) and line.score]
    if not trained:
        return []
    group = [line for line in trained if set(line.letters) & set(trained[0].letters)] or trained[:1]
    return group if len(group) < len(trained) else []


def _table(
    view: View, name: str, title: str, columns: Sequence[Column], lines: Sequence[Line], rows: Sequence[Sequence[Any]]
) -> Table:
    at = next((place for place, column in enumerate(columns) if column.key == "score"), None)
    strong = {(row, at) for row, line in enumerate(lines) if line.best and at is not None}
    colours = [view.look(line.factors).colour for line in lines]
    table = Table(name, title, "", columns, rows, frozenset((row, place or 0) for row, place in strong), colours)
    return table.without_empty()


def _axes(view: View) -> list[Column]:
    contrast = view.analysis.contrast
    return [words(axis, axis_words(axis)) for axis in [contrast, *(axis for axis in view.axes if axis != contrast)]]


def _labels(view: View, line: Line) -> list[str]:
    return [line.factors.get(column.key, NOT_VARIED) for column in _axes(view)]


def _scored(view: View) -> list[Column]:
    unit = view.in_unit
    return [
        *_axes(view),
        whole("seeds", "seeds", "runs that differ in the seed alone"),
        score("score", f"score{unit}", "mean over seeds, with its interval over seeds and questions", spread="sd"),
        words("letters", "group", "lines of one block that share a letter cannot be told apart"),
        score("sd", "SD", "standard deviation over seeds"),
        score("gain", f"gain{view.in_points}", "score minus the zero-shot score, question by question", signed=True),
        score("seen", f"seen{unit}", "mean score on the tasks that the base could already do"),
        score("forgotten", f"forgotten{view.in_points}",
              "drop of that mean against zero-shot; below zero it became better"),
        score("hallucination", "hallucination", "less is better"),
        score("robustness", "robustness", "score at the last point of the training curve minus that at the best",
              signed=True),
    ]  # fmt: skip


def _scores(view: View, line: Line) -> list[Any]:
    return [
        *_labels(view, line),
        line.seeds,
        line.score,
        line.letters or None,
        line.sd,
        line.gain,
        line.seen,
        line.forgotten,
        line.hallucination,
        line.robustness,
    ]


def _cost(name: str) -> Column:
    measure = MEASURES[name]
    return measured(name, measure.words, measure.text, "mean over seeds")
