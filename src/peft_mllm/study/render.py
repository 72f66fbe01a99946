"""A comparison as a terminal table, Markdown, CSV and JSON. The columns are named once, for the page too."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from peft_mllm.study import wording
from peft_mllm.study.compare import Comparison, Row
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.tables.escapes import markdown, spreadsheet


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        help: what it says, in a sentence.
        text: the cell for a person.
        detail: what stands small beside it: an interval, a share.
        order: what it is sorted by; None stays last.
        numeric: set to the right.
        headline: the score that the runs compete for.
    """

    title: str
    help: str
    text: Callable[[Row], str]
    order: Callable[[Row], float | str | None]
    detail: Callable[[Row], str] = lambda _: ""
    numeric: bool = True
    headline: bool = False


def columns(comparison: Comparison) -> list[Column]:
    """The columns that have something to say in this comparison."""
    every = [*_about_the_run(), *_about_the_scores(comparison), *_about_the_cost(comparison)]
    return [column for column in every if any(_says(column, row) for row in comparison.rows)]


def _says(column: Column, row: Row) -> bool:
    return column.text(row) != wording.NOTHING


def _about_the_run() -> list[Column]:
    return [
        Column(
            "run",
            "the run, with method and place where its name does not say them",
            text=lambda row: row.run,
            order=lambda row: row.run.lower(),
            detail=_described,
            numeric=False,
        ),
        Column(
            "trainable",
            "trainable parameters, and their share of the model",
            text=lambda row: wording.count(row.trainable),
            order=lambda row: row.trainable,
            detail=lambda row: wording.per_cent(row.share) if row.trainable else "",
        ),
    ]


def _about_the_scores(comparison: Comparison) -> list[Column]:
    unit = f" {comparison.unit}" if comparison.unit else ""
    return [
        Column(
            f"{comparison.task}{unit}",
            f"score on the new task; {comparison.rule or comparison.metric}",
            text=lambda row: wording.figure(_value(row.score)),
            order=lambda row: _value(row.score),
            detail=lambda row: wording.interval(row.score),
            headline=True,
        ),
        Column(
            "gain",
            "score minus the zero-shot score",
            text=lambda row: wording.figure(_value(row.gain), signed=True),
            order=lambda row: _value(row.gain),
            detail=lambda row: wording.interval(row.gain, signed=True),
        ),
        Column(
            f"seen{unit}",
            f"mean over {wording.and_list(comparison.seen, most=8)}",
            text=lambda row: wording.figure(row.seen),
            order=lambda row: row.seen,
        ),
        Column(
            "forgotten",
            "drop of that mean against zero-shot; below zero it became better",
            text=lambda row: wording.figure(_value(row.forgotten)),
            order=lambda row: _value(row.forgotten),
            detail=lambda row: wording.interval(row.forgotten),
        ),
    ]


def _about_the_cost(comparison: Comparison) -> list[Column]:
    return [
        Column(
            "unparsed",
            f"predictions on {comparison.task} that the metric could not read; they count as wrong",
            text=lambda row: str(row.unparsed) if row.score else wording.NOTHING,
            order=lambda row: row.unparsed if row.score else None,
            detail=lambda row: f"of {row.questions}" if row.score else "",
        ),
        Column(
            "time",
            "of training",
            text=lambda row: wording.duration(row.seconds),
            order=lambda row: row.seconds or None,
        ),
        Column(
            "adapter",
            "size of what was saved",
            text=lambda row: wording.size(row.adapter_bytes),
            order=lambda row: row.adapter_bytes or None,
        ),
    ]


def terminal_table(comparison: Comparison) -> Table:
    """A rich table that fits 80 columns; the best score is bold where there is one."""
    shown = columns(comparison)
    table = Table(
        title=f"score on {escape(comparison.task)}",
        caption=escape("\n".join(comparison.notes)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0),
    )
    for column in shown:
        title = f"score {comparison.unit}".strip() if column.headline else column.title
        table.add_column(escape(title), justify="right" if column.numeric else "left", overflow="fold")
    for row in comparison.rows:
        table.add_row(*(_terminal_cell(column, row) for column in shown))
    return table


def _terminal_cell(column: Column, row: Row) -> str:
    """The cell's text, with the detail below it where there is room for one."""
    text = escape(column.text(row))
    text = f"[bold]{text}[/bold]" if row.best and column.headline else text
    detail = column.detail(row) if column.headline or not column.numeric else ""
    return f"{text}\n[dim]{escape(detail)}[/dim]" if detail else text


def markdown_table(comparison: Comparison) -> str:
    """A Markdown table; the best score is bold where there is one. README's is made by this."""
    shown = columns(comparison)
    lines = [_markdown_line([markdown(column.title) for column in shown])]
    lines.append(_markdown_line(["---:" if column.numeric else "---" for column in shown]))
    lines += [_markdown_line(list(_markdown_cells(shown, row))) for row in comparison.rows]
    return "\n".join(lines) + "\n"


def csv_table(comparison: Comparison) -> str:
    """Every field of every row with all its digits, for a spreadsheet."""
    flat = [dict(_flat(row)) for row in comparison.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def json_table(comparison: Comparison) -> str:
    """The comparison as it is, for a program."""
    return json.dumps(asdict(comparison), indent=2, ensure_ascii=False) + "\n"


def _described(row: Row) -> str:
    """Method and place, as far as the run's name leaves them open."""
    if row.zero_shot:
        return ""
    parts = [] if row.method.lower() in row.run.lower() else [row.method]
    return ", ".join(parts + ([row.location] if row.location else []))


def _value(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate else None


def _joined(column: Column, row: Row) -> str:
    detail = column.detail(row)
    return f"{column.text(row)} ({detail})" if detail else column.text(row)


def _markdown_cells(shown: list[Column], row: Row) -> Iterator[str]:
    for column in shown:
        text = markdown(_joined(column, row))
        yield f"**{text}**" if row.best and column.headline else text


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _flat(row: Row) -> Iterator[tuple[str, object]]:
    for name, value in asdict(row).items():
        if name in ("score", "gain", "forgotten"):
            limits = value or {"value": None, "low": None, "high": None}
            yield name, limits["value"]
            yield f"{name}_low", limits["low"]
            yield f"{name}_high", limits["high"]
        else:
            yield name, spreadsheet(value)
