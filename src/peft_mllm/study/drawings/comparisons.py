"""Figures that compare: lines of a block, ranks over tasks, effects of factors, budgets, trials, and the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_mllm.study import wording
from peft_mllm.study.analysis import Block, Effect, Line, Matched, Overall, PaperCell
from peft_mllm.study.drawings.canvas import Drawing
from peft_mllm.study.drawings.looks import Look
from peft_mllm.study.drawings.rows import Row, Rows, draw_rows, grouped
from peft_mllm.study.drawings.sheets import PANELS
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.view import View, capped, words

ROWS = 36
"""Of a figure with one panel."""
POOLED = Look("#6b7079", "D")
OURS = Look("#2f7fd1", "o")


def blocks_plot(view: View) -> Drawing | None:
    """Scores of each block's lines with intervals and the letters of groups."""
    blocks = [block for block in view.analysis.blocks if any(line.score for line in view.members(block))]
    if not blocks:
        return None
    figure = draw_rows([_block_panel(view, block) for block in blocks[:PANELS]], longest=22)
    return Drawing(
        "groups",
        "Scores within each block",
        _sentences(
            view.bars,
            "Dashed: zero-shot. Lines that share a letter cannot be told apart.",
            capped(len(blocks), PANELS, "blocks", "tables/scores"),
        ),
        figure,
    )


def _block_panel(view: View, block: Block) -> Rows:
    lines = view.members(block)
    start = next((line.score for line in lines if not view.trained(line)), None)
    rows = [
        Row(view.name(line, block.factors), [(line.score, True)], view.look(line.factors), line.letters)
        for line in lines
        if line.score and view.trained(line)
    ]
    return Rows(view.block_title(block), f"score{view.in_unit}", rows, start=start)


def hallucination_plot(view: View) -> Drawing | None:
    """How much each block's lines make up."""
    blocks = [block for block in view.analysis.blocks if any(_made_up(view, block))]
    if not blocks:
        return None
    panels = []
    for block in blocks[:PANELS]:
        start = next((line for line in view.members(block) if not view.trained(line)), None)
        known = sorted(_made_up(view, block), key=lambda pair: pair[0])
        rows = [
            Row(view.name(line, block.factors), [(Estimate(share), True)], view.look(line.factors))
            for share, line in known
            if view.trained(line)
        ]
        zero_shot = Estimate(start.hallucination) if start and start.hallucination is not None else None
        panels.append(Rows(view.block_title(block), "hallucination (%)", rows, start=zero_shot))
    return Drawing(
        "hallucination",
        "Hallucination",
        _sentences(
            "Mean over seeds, at the adapter that was kept; less is better. Dashed: zero-shot.",
            capped(len(blocks), PANELS, "blocks", "tables/scores"),
        ),
        draw_rows(panels),
    )


def _made_up(view: View, block: Block) -> list[tuple[float, Line]]:
    return [(line.hallucination, line) for line in view.members(block) if line.hallucination is not None]


def rank_plot(view: View) -> Drawing | None:
    """Mean rank over tasks with its interval."""
    groups = overall_groups(view)
    if not groups:
        return None
    panels = [_rank_panel(view, title, some) for title, some in list(groups.items())[:PANELS]]
    return Drawing(
        "ranks",
        "Rank over all tasks",
        _sentences(
            f"Each task has equal weight. Bars: 95{wording.GLUE}% of the ranks that other seeds and questions would"
            " give; beside them, in how many of those draws it is first.",
            capped(len(groups), PANELS, "groups", "tables/overall"),
        ),
        draw_rows(panels),
    )


def overall_groups(view: View) -> Mapping[str, list[Overall]]:
    """The contrasted levels over all tasks, by what else differs."""
    return grouped(view.analysis.overall, lambda each: view.place(each.factors))


def _rank_panel(view: View, title: str, some: Sequence[Overall]) -> Rows:
    rows = [
        Row(
            view.rival(each.factors),
            [(Estimate(each.rank.mean, each.rank.low, each.rank.high), True)],
            view.look(each.factors),
            f"first in {100 * each.rank.first:.0f}{wording.GLUE}%",
        )
        for each in sorted(some, key=lambda each: each.rank.mean)
    ]
    return Rows(title, "mean rank (1 is best)", rows, limits=(0.7, max(len(rows), 2) + 0.3))


def effects_plot(view: View) -> Drawing | None:
    """The effect of each factor: pooled, and by what it was measured within."""
    effects = view.analysis.effects
    if not effects:
        return None
    rows = [_effect_row(view, effect) for effect in effects[:ROWS]]
    return Drawing(
        "effects",
        "What changing one thing does",
        _sentences(
            "All else equal. Filled: pooled over all matched cells; open: within one level.",
            view.bars,
            "At the right the change, and p adjusted by Holm.",
            capped(len(effects), ROWS, "effects", "tables/effects"),
        ),
        draw_rows([Rows("", f"change of the score{view.in_points}", rows, zero=True)], longest=46),
    )


def _effect_row(view: View, effect: Effect) -> Row:
    beside = f"{wording.figure(effect.value.value, signed=True)}  {p_value(effect.p_adjusted)}".strip()
    look = view.look(effect.where) if effect.where else POOLED
    return Row(effect_name(view, effect), [(effect.value, not effect.where)], look, beside)


def effect_name(view: View, effect: Effect) -> str:
    """`connector frozen → tuned`, and within which cells."""
    head = f"{words(effect.axis)} {effect.low_level} \N{RIGHTWARDS ARROW} {effect.high_level}"
    return f"{head}, {view.title(effect.where) or ', '.join(effect.where.values())}" if effect.where else head


def p_value(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def matched_plot(view: View) -> Drawing | None:
    """Methods that spend the same."""
    groups = matched_groups(view)
    if not groups:
        return None
    kinds = grouped(groups.items(), lambda pair: pair[1][0].by).values()
    # of many, some of each kind
    few = [pair for pairs in kinds for pair in (pairs if len(groups) <= PANELS else pairs[: PANELS // len(kinds)])]
    panels = [_matched_panel(view, title, some) for title, some in few]
    fewer = len(few) < len(groups)
    left_out = f"Shown are {len(few)} of {len(groups)} budgets; all are in tables/matched." if fewer else ""
    return Drawing(
        "matched",
        "When all spend the same",
        _sentences(
            "With equal parameters the score, with equal training time the lowest validation loss.",
            view.bars,
            _clock(view),
            left_out,
        ),
        draw_rows(panels),
    )


def _clock(view: View) -> str:
    """What a reader must know of equal time."""
    if not any(each.by == "time" for each in view.analysis.matched):
        return ""
    return "Time is what this machine took, other runs beside it: another machine, or fewer runs, may turn the order."


def matched_groups(view: View) -> Mapping[str, list[Matched]]:
    """The views by their budget and what they share, in words."""
    return grouped(view.analysis.matched, lambda each: _budget(view, each))


def _budget(view: View, each: Matched) -> str:
    budget = wording.duration(each.budget) if each.by == "time" else f"{wording.count(round(each.budget))} parameters"
    shared = view.title(each.shared)
    return ", ".join(filter(None, [budget, shared]))


def _matched_panel(view: View, title: str, some: Sequence[Matched]) -> Rows:
    by_time = some[0].by == "time"
    ordered = sorted(some, key=lambda each: each.value.value, reverse=not by_time)
    rows = [
        Row(view.rival(each.factors), [(each.value, True)], view.look(each.factors), f"n = {each.seeds}")
        for each in ordered
    ]
    return Rows(title, "lowest validation loss" if by_time else f"score{view.in_unit}", rows)


def trials_plot(view: View) -> Drawing | None:
    """The search: every trial on validation data, the chosen ones filled."""
    contrast = view.analysis.contrast
    groups = grouped(view.analysis.trials, lambda each: view.title(each.factors, without=[contrast]))
    panels = []
    for title, some in list(groups.items())[:PANELS]:
        by_level = grouped(some, lambda each: each.factors.get(contrast, ""))
        rows = [
            Row(
                level,
                [(Estimate(trial.score), trial.chosen) for trial in trials if trial.score is not None],
                view.look({contrast: level}),
                f"{len(trials)} trials",
            )
            for level, trials in by_level.items()
        ]
        panels.append(Rows(title, f"score on validation data{view.in_unit}", rows))
    if not panels:
        return None
    return Drawing(
        "search",
        "The search",
        _sentences(
            "Every trial on validation data; filled is what was chosen for the runs that count.",
            capped(len(groups), PANELS, "searches", "tables/trials"),
        ),
        draw_rows(panels),
    )


def paper_plot(view: View) -> Drawing | None:
    """Ours minus the paper's, cell by cell."""
    cells = [cell for cell in view.analysis.paper if cell.difference is not None and cell.ours]
    if not cells:
        return None
    rows = [
        Row(
            f"{cell.table}: {cell.row}, {cell.column}",
            [(_against(cell), True)],
            OURS,
            wording.figure(cell.difference, signed=True),
        )
        for cell in cells[:ROWS]
    ]
    return Drawing(
        "paper",
        "Against the paper",
        _sentences(
            "Ours minus the paper's figure, with our interval.", capped(len(cells), ROWS, "cells", "tables/paper")
        ),
        draw_rows([Rows("", f"ours minus the paper's{view.in_points}", rows, zero=True)], longest=48),
    )


def _against(cell: PaperCell) -> Estimate:
    """Our interval, moved to the difference."""
    ours, theirs = cell.ours or Estimate(0.0), cell.paper or 0.0
    low, high = (None if limit is None else limit - theirs for limit in (ours.low, ours.high))
    return Estimate(cell.difference or 0.0, low, high)


def _sentences(*some: str) -> str:
    return " ".join(filter(None, some))
