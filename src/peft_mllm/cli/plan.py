"""The verb that says how much memory a run will take. Imports torch when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import SpecError

if TYPE_CHECKING:
    from peft_mllm.memory.plan import MemoryPlan

verbs = typer.Typer()

COLUMNS = {
    "weights": ("weights",),
    "training": ("gradients", "optimizer", "update"),
    "activations": ("activations", "backward"),
    "rest": ("logits", "vision"),
}
"""Of the table, and the parts of the peak in them."""
UNITS = {"g": 10**9, "gb": 10**9, "gib": 1024**3, "m": 10**6, "mb": 10**6, "mib": 1024**2}


@verbs.command(
    epilog=example(
        "peft-mllm plan run.yaml",
        "peft-mllm plan run.yaml --memory 24GiB",
        "peft-mllm plan run.yaml train.per_device_train_batch_size=64 speed.recompute=full --json",
    )
)
def plan(
    spec: Annotated[Path, typer.Argument(help="YAML file that says what to run (docs/tour.md), or a run's directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="How much there is, such as 80GB; else what is free here.")] = None,
    as_json: Json = False,
) -> None:
    """Show how much memory a step of training takes, and how it would be computed; no weights are loaded."""
    from peft_mllm.memory.asked import plan_of
    from peft_mllm.specfile import load_spec_of

    made = plan_of(load_spec_of(spec, overrides or ()), available=None if memory is None else bytes_of(memory))
    if as_json:
        say_json(made.to_json())
        return
    if made.table:
        console.print(table_of(made))
    for line in made.in_words():
        console.print(line, markup=False)


def bytes_of(text: str) -> int:
    """A size with its unit, in bytes.

    Raises:
        SpecError: it is none.
    """
    number = text.strip().rstrip("BGIMbgim")
    unit = text.strip()[len(number) :].lower()
    try:
        return round(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise SpecError(f"--memory {text}: write a number with GB, GiB, MB or MiB, such as 80GB.") from None


def table_of(made: MemoryPlan) -> Table:
    """A line for each way to compute a step."""
    from peft_mllm.memory.plan import gib

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("recompute")
    for heading in ("at once", "peak", *COLUMNS, "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    for row in made.table:
        figures = [gib(sum(row.parts.get(name, 0) for name in names)) for names in COLUMNS.values()]
        table.add_row(
            str(row.policy),
            f"{row.tokens:,}",
            gib(row.peak),
            *figures,
            f"{row.time:.2f}x",
            "taken" if row.policy == made.policy else "yes" if row.fits else "no",
        )
    return table
