"""A study for a terminal: what was found in a sentence per block, and one table. Short: the report has the rest."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from peft_mllm.study.analysis import Analysis
from peft_mllm.study.tables.findings import overall
from peft_mllm.study.tables.model import Table
from peft_mllm.study.tables.overview import overview
from peft_mllm.study.view import View

SHOWN = {"score": "", "letters": "", "gain": "gain", "forgotten": "forgotten", "trainable": "trains", "seconds": "time"}
"""Columns of lines that the terminal shows beside their axes, with a heading that is short where the table's is not."""
MOST_SENTENCES = 6
MOST_ROWS = 12


def terminal_summary(analysis: Analysis) -> RenderableType:
    """Sentences and table, to be printed by rich.

    The table has the methods over all tasks; the lines themselves where there is one task or one block.
    """
    view = View(analysis)
    over_all = len(analysis.blocks) > 1 and bool(analysis.overall)
    table = overall(view) if over_all else overview(view, analysis.lines[:MOST_ROWS]).only({*view.axes, *SHOWN})
    said = [Text(f"\N{BULLET} {block.sentence}") for block in analysis.blocks[:MOST_SENTENCES]]
    unfinished = [Text(note) for note in analysis.notes[:1] if analysis.missing or analysis.failed]
    rest = Text(f"In the report: {', '.join(_left_out(analysis, over_all))}.", style="dim")
    return Group(Text(analysis.title, style="bold"), *unfinished, *said, Text(), _drawn(table), Text(), rest)


def _drawn(table: Table) -> RichTable:
    """The first rows, one line each where the terminal is wide enough."""
    made = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0))
    for column in table.columns:
        title = SHOWN.get(column.key) or column.title
        made.add_column(escape(title), justify="right" if column.numeric else "left", overflow="fold")
    for place, row in enumerate(table.rows[:MOST_ROWS]):
        cells = []
        for at, (column, value) in enumerate(zip(table.columns, row, strict=True)):
            detail = column.beside(value) if column.key == "score" else ""
            text = escape(column.say(value))
            text = f"[bold]{text}[/bold]" if (place, at) in table.strong else text
            cells.append(f"{text} [dim]({escape(detail)})[/dim]" if detail else text)
        made.add_row(*cells)
    return made


def _left_out(analysis: Analysis, over_all: bool) -> Iterator[str]:
    """What the report has and the terminal does not show, the gravest first."""
    if analysis.notes:
        yield f"{len(analysis.notes)} cautions" if len(analysis.notes) > 1 else "a caution"
    if (more := len(analysis.blocks) - MOST_SENTENCES) > 0:
        yield f"{more} more findings" if more > 1 else "one more finding"
    if over_all or len(analysis.lines) > MOST_ROWS:
        yield f"all {len(analysis.lines)} lines"
    yield "every run and question"
