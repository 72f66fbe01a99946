"""A table as Markdown, LaTeX and CSV; equal tables give equal bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from peft_mllm.study.statistics import Estimate
from peft_mllm.study.tables.escapes import latex, markdown, spreadsheet
from peft_mllm.study.tables.model import Column, Table


def markdown_table(table: Table) -> str:
    """Heading, table, caption."""
    lines = [f"## {markdown(table.title)}", ""]
    lines.append(_piped(markdown(column.title) for column in table.columns))
    lines.append(_piped("---:" if column.numeric else "---" for column in table.columns))
    for place, row in enumerate(table.rows):
        lines.append(_piped(_cell(table, place, at, value) for at, value in enumerate(row)))
    if table.caption:
        lines += ["", markdown(table.caption)]
    return "\n".join(lines) + "\n"


def _piped(cells: Iterator[str] | Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(table: Table, row: int, at: int, value: Any) -> str:
    column = table.columns[at]
    detail = column.beside(value)
    text = markdown(column.say(value)) + (f" ({markdown(detail)})" if detail else "")
    return f"**{text}**" if (row, at) in table.strong else text


def csv_table(table: Table) -> str:
    """Every value with all its digits; an estimate has three columns, its value and the limits of its interval."""
    wide = [any(isinstance(row[at], Estimate) for row in table.rows) for at in range(len(table.columns))]
    head: list[str] = []
    for column, three in zip(table.columns, wide, strict=True):
        head += [column.key, f"{column.key}_low", f"{column.key}_high"] if three else [column.key]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in table.rows:
        writer.writerow([cell for value, three in zip(row, wide, strict=True) for cell in _flat(value, three)])
    return text.getvalue()


def _flat(value: Any, three: bool) -> Sequence[object]:
    if isinstance(value, Estimate):
        return [value.value, value.low, value.high]
    return [spreadsheet(value), None, None] if three else [spreadsheet(value)]


def latex_table(tables: Sequence[Table], *, label: str) -> str:
    """Tables for booktabs: estimates with the spread over seeds small beside them, strong cells bold.

    Needs `booktabs` and, for tables longer than a page, `longtable`.
    """
    return "\n".join(_latex(table, f"{label}:{number}") for number, table in enumerate(tables, 1))


def _latex(table: Table, label: str) -> str:
    hidden = {column.spread for column in table.columns if column.spread}
    shown = [at for at, column in enumerate(table.columns) if column.key not in hidden]
    places = {column.key: at for at, column in enumerate(table.columns)}
    form = "".join("r" if table.columns[at].numeric else "l" for at in shown)
    lines = [
        r"\begin{longtable}{@{}" + form + r"@{}}",
        rf"\caption{{{latex(' '.join(filter(None, [table.title + '.', table.caption])))}}}\label{{{label}}}\\",
        r"\toprule",
        " & ".join(latex(table.columns[at].title) for at in shown) + r" \\",
        r"\midrule",
        r"\endhead",
    ]
    for number, row in enumerate(table.rows):
        cells = [_latex_cell(table.columns[at], row, at, places, bold=(number, at) in table.strong) for at in shown]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{longtable}", ""])


def _latex_cell(column: Column, row: Sequence[Any], at: int, places: dict[str, int], *, bold: bool) -> str:
    text = latex(column.say(row[at]))
    text = rf"\textbf{{{text}}}" if bold else text
    spread = row[places[column.spread]] if column.spread in places else None
    return rf"{text} {{\scriptsize $\pm$ {spread:.1f}}}" if spread is not None else text
