"""The tables of what an analysis found: differences, effects, transfers, trials, budgets, fronts, the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_mllm.study import wording
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.tables.model import Column, Table, exact, probability, rank, score, share, whole, words
from peft_mllm.study.view import View
from peft_mllm.study.view import words as axis_words


def findings(view: View) -> list[Table]:
    """Those that have rows."""
    made = [
        blocks(view),
        differences(view),
        overall(view),
        effects(view),
        transfers(view),
        trials(view),
        matched(view),
        fronts(view),
        paper(view),
        claims(view),
        failed(view),
    ]
    return [table.without_empty() for table in made if table.rows]


def blocks(view: View) -> Table:
    """What may be concluded within each block."""
    columns = [words("block", "block"), words("sentence", "what may be concluded")]
    rows = [[view.block_title(block), block.sentence] for block in view.analysis.blocks]
    return Table("blocks", "Block by block", "", columns, rows)


def differences(view: View) -> Table:
    """All pairs of each block."""
    columns = [
        words("block", "block"),
        words("first", "first"),
        words("second", "second"),
        score("difference", f"difference{view.in_points}", "first minus second, by seed and question", signed=True),
        probability("p", "p"),
        probability("p_adjusted", "p adjusted", "by Holm within the block"),
    ]
    rows = [
        [
            view.block_title(block),
            each.first,
            each.second,
            Estimate(each.value, each.low, each.high),
            each.p,
            each.p_adjusted,
        ]
        for block in view.analysis.blocks
        for each in block.differences
    ]
    return Table("differences", "All pairs", "First minus second.", columns, rows)


def overall(view: View) -> Table:
    """Methods over all tasks."""
    axes = _axes(view, *(each.factors for each in view.analysis.overall))
    columns = [
        *axes,
        whole("tasks", "tasks"),
        score("score", f"mean score{view.in_unit}", "each task has equal weight"),
        rank("rank", "mean rank", "1 is best; with its interval over seeds and questions"),
        share("first", "first in", "share of the bootstrap's draws in which it is first"),
    ]
    rows = [
        [
            *_labels(axes, each.factors),
            each.tasks,
            each.score,
            Estimate(each.rank.mean, each.rank.low, each.rank.high),
            each.rank.first,
        ]
        for each in view.analysis.overall
    ]
    colours = [view.look(each.factors).colour for each in view.analysis.overall]
    return Table("overall", "Over all tasks", "", columns, rows, colours=colours)


def effects(view: View) -> Table:
    """Factors, pooled and within."""
    columns = [
        words("axis", "factor"),
        words("low", "from"),
        words("high", "to"),
        words("where", "within"),
        score("change", f"change{view.in_points}", "mean paired difference", signed=True),
        probability("p", "p"),
        probability("p_adjusted", "p adjusted", "by Holm within the factor"),
        whole("cells", "cells", "matched cells: equal but for this factor"),
        whole("agree", "same sign", "cells whose difference has the sign of the mean"),
    ]
    rows = [
        [
            axis_words(each.axis),
            each.low_level,
            each.high_level,
            view.title(each.where) or ", ".join(each.where.values()) or "all",
            each.value,
            each.p,
            each.p_adjusted,
            each.cells,
            each.agree,
        ]
        for each in view.analysis.effects
    ]
    return Table("effects", "Effects", "Level against level, all else equal.", columns, rows)


def transfers(view: View) -> Table:
    """Task to task."""
    axes = [axis for axis in _axes(view, *(each.factors for each in view.analysis.transfers)) if axis.key != "task"]
    columns = [
        *axes,
        words("source", "trained on"),
        words("target", "scored on"),
        Column("point", "point", "evaluations after the best; final: the adapter that was kept"),
        score("value", f"score{view.in_unit}"),
        score("change", f"against zero-shot{view.in_points}", signed=True),
    ]
    rows = [
        [
            *_labels(axes, each.factors),
            each.source,
            each.target,
            "final" if each.point is None else str(each.point),
            each.value,
            each.change,
        ]
        for each in view.analysis.transfers
    ]
    return Table("transfers", "From task to task", "", columns, rows)


def trials(view: View) -> Table:
    """The search."""
    axes = _axes(view, *(each.factors for each in view.analysis.trials))
    columns = [
        *axes,
        words("tried", "tried"),
        score("score", f"validation score{view.in_unit}"),
        words("chosen", "chosen"),
        words("run", "run"),
    ]
    rows = [
        [*_labels(axes, each.factors), each.tried, each.score, "yes" if each.chosen else "", each.run]
        for each in view.analysis.trials
    ]
    return Table("trials", "Trials of the search", "Scored on validation data alone.", columns, rows)


def matched(view: View) -> Table:
    """Equal budgets."""
    axes = _axes(view, *(each.factors for each in view.analysis.matched))
    columns = [
        words("by", "equal"),
        words("budget", "budget"),
        *axes,
        words("spent", "spent"),
        whole("seeds", "seeds"),
        exact("value", "score or lowest validation loss", "score with equal parameters, loss with equal time"),
        words("missing", "not in it", "rivals with a seed that was not yet evaluated by then"),
    ]
    rows = [
        [
            each.by,
            _amount(each.by, each.budget),
            *_labels(axes, each.factors),
            _amount(each.by, each.spent),
            each.seeds,
            each.value,
            ", ".join(each.missing),
        ]
        for each in view.analysis.matched
    ]
    return Table("matched", "Equal budgets", "", columns, rows)


def _amount(by: str, value: float) -> str:
    return wording.duration(value) if by == "time" else wording.count(round(value))


def fronts(view: View) -> Table:
    """Pareto fronts."""
    columns = [words("block", "block"), words("x", "measure"), words("y", "against"), words("lines", "on the front")]
    rows: list[list[Any]] = [
        [
            view.where(front.factors),
            _measure(front.x),
            _measure(front.y),
            ", ".join(view.name(view.analysis.lines[place], front.factors) for place in front.lines),
        ]
        for front in view.analysis.fronts
    ]
    return Table("fronts", "Pareto fronts", "Lines that no other of the block beats in both measures.", columns, rows)


def _measure(name: str) -> str:
    return MEASURES[name].words if name in MEASURES else name


def paper(view: View) -> Table:
    """Cell by cell."""
    columns = [
        words("table", "table"),
        words("row", "row"),
        words("column", "column"),
        score("paper", "paper"),
        score("ours", "ours"),
        score("difference", "difference", "ours minus the paper's", signed=True),
    ]
    rows = [[each.table, each.row, each.column, each.paper, each.ours, each.difference] for each in view.analysis.paper]
    return Table("paper", "Against the paper", "A cell that cannot be read in the paper stays empty.", columns, rows)


def claims(view: View) -> Table:
    """The paper's claims."""
    columns = [
        whole("number", "number"),
        words("claim", "claim"),
        words("verdict", "on our runs"),
        words("because", "because"),
        words("in_paper", "in the paper"),
    ]
    rows = [[each.number, each.claim, each.verdict, each.because, each.in_paper] for each in view.analysis.claims]
    return Table("claims", "The paper's claims", "", columns, rows)


def failed(view: View) -> Table:
    """Runs without a result."""
    columns = [words("run", "run"), words("cause", "cause")]
    return Table("failed", "Runs set aside", "", columns, [list(each) for each in view.analysis.failed])


def _axes(view: View, *factors: Mapping[str, str]) -> list[Column]:
    """The axes that say something there."""
    contrast = view.analysis.contrast
    known = [contrast, *(axis for axis in view.axes if axis != contrast)]
    return [words(axis, axis_words(axis)) for axis in known if any(axis in each for each in factors)]


def _labels(axes: list[Column], factors: Mapping[str, str]) -> list[str | None]:
    return [factors.get(axis.key) for axis in axes]
