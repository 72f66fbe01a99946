"""What verbs say: JSON for programs, tables for people, and how they end."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

console = Console(highlight=False, soft_wrap=True)


def example(*lines: str) -> str:
    """An epilogue with commands to copy."""
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def say_json(value: Any) -> None:
    """One object on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def show_scores(scores: dict[str, Any], notes: list[str]) -> None:
    """A table of tasks and figures."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "metric", "score", "questions", "not understood"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for name, each in scores.items():
        figure, value = next(iter(each["values"].items()))
        table.add_row(name, f"{each['metric']} {figure}", f"{value:.2f}", str(each["n"]), str(each["unparsed"]))
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}", markup=False)


def show_options(options: list[dict[str, str]]) -> None:
    """A table of options with type, default and meaning."""
    table = Table(box=None, padding=(0, 2, 0, 2))
    for heading in ("option", "type", "default", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "option")
    for option in options:
        table.add_row(*(option[key] for key in ("name", "type", "default", "meaning")))
    console.print(table)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """What is wrong with a model and will show nowhere else; not the line of our code that says so."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"Warning: {message}", markup=False)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to standard error and end with a code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
    sys.exit(code)
