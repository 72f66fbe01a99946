"""The lines' figures for the page's script, which sets any two against one another and finds the front."""

from __future__ import annotations

from typing import Any

from peft_mllm.study.analysis import Block
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.view import View

DIGITS = 6


def pareto_data(view: View) -> dict[str, Any] | None:
    """None where no two figures are known.

    Returns:
        `measures` ([name, title, whether more is better, whether logarithmic]), `blocks` ([title, [line, name] ...])
        and `lines` ([colour, marker, figures in the order of measures]).
    """
    lines = view.analysis.lines
    known = [
        measure
        for measure in MEASURES.values()
        if len({value for line in lines if (value := measure.of(line)) is not None}) > 1
    ]
    if len(known) < 2 or len(lines) < 2:
        return None

    def members(block: Block) -> list[list[Any]]:
        rivals = [place for place in block.lines if view.trained(lines[place])]
        return [[place, view.name(lines[place], block.factors)] for place in rivals]

    return {
        "measures": [[each.name, each.plain_title(view.unit), int(each.more), int(each.logarithmic)] for each in known],
        "blocks": [[view.block_title(block), members(block)] for block in view.analysis.blocks],
        "lines": [
            [view.look(line.factors).colour, view.look(line.factors).glyph, [_short(each.of(line)) for each in known]]
            for line in lines
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
