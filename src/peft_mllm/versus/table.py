"""A comparison of two as a table in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from peft_mllm.study import wording
from peft_mllm.versus.pairs import Comparison


def terminal_table(comparison: Comparison) -> Table:
    """One row a task: both figures, the difference with its interval, and how the questions divide; fits 80 columns."""
    first, second = comparison.names
    table = Table(
        caption=escape(f"A: {first}\nB: {second}"),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("task", overflow="fold")
    for heading in ("A", "B", f"B {wording.MINUS} A", "only A", "only B", "both", "neither", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in comparison.contests:
        span = wording.interval(each.difference, signed=True)
        difference = wording.figure(each.difference.value, signed=True)
        table.add_row(
            escape(each.task),
            wording.figure(each.a.headline),
            wording.figure(each.b.headline),
            f"{difference}\n[dim]{span}[/]" if span else difference,
            str(len(each.only_a)),
            str(len(each.only_b)),
            str(each.both),
            str(each.neither),
            f"[bold]{each.p:.2g}[/]" if each.told_apart else f"{each.p:.2g}",
        )
    return table
