"""A study for a terminal: what was found in a sentence per block, and its lines as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from peft_mllm.study.analysis import Analysis
from peft_mllm.study.tables.overview import overview
from peft_mllm.study.view import View

SHOWN = ("seeds", "score", "letters", "gain", "forgotten", "trainable", "seconds")
MOST = 40
"""Lines that the terminal shows; the report has all."""


def terminal_summary(analysis: Analysis) -> RenderableType:
    """Sentences and table, to be printed by rich."""
    view = View(analysis)
    lines = analysis.lines[:MOST]
    table = overview(view, lines)
    axes = set(view.axes)
    chosen = [at for at, column in enumerate(table.columns) if column.key in axes or column.key in SHOWN]
    made = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for at in chosen:
        column = table.columns[at]
        made.add_column(escape(column.title), justify="right" if column.numeric else "left", overflow="fold")
    for place, row in enumerate(table.rows):
        cells = []
        for at in chosen:
            column = table.columns[at]
            detail = column.beside(row[at]) if column.key == "score" else ""
            text = escape(column.say(row[at]))
            text = f"[bold]{text}[/bold]" if (place, at) in table.strong else text
            cells.append(f"{text}\n[dim]{escape(detail)}[/dim]" if detail else text)
        made.add_row(*cells)
    more = len(analysis.lines) - len(lines)
    said = [Text(block.sentence) for block in analysis.blocks[:MOST]]
    notes = [Text(note, style="dim") for note in analysis.notes]
    rest = [Text(f"{more} more lines are in the report.", style="dim")] if more > 0 else []
    return Group(Text(analysis.title, style="bold"), *said, Text(), made, *rest, *notes)
