"""The verb that compares two runs question by question. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_mllm.cli.say import Json, console, example, say_json

verbs = typer.Typer()


@verbs.command(
    epilog=example(
        "peft-mllm compare runs/lora runs/ia3",
        "peft-mllm compare runs/zero-shot runs/lora --task scenes_count --output forgotten.html",
        "peft-mllm compare scores/lora scores/ia3 --json",
    )
)
def compare(
    run_a: Annotated[Path, typer.Argument(help="A finished run, or the --output of `evaluate` for one target.")],
    run_b: Annotated[Path, typer.Argument(help="Another that was asked the same questions.")],
    task: Annotated[str | None, typer.Option(help="This task alone; all that both have answered if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write one HTML page, with the images.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Shown on the page, of each kind and task.")] = 24,
    as_json: Json = False,
) -> None:
    """Show what one run gets right and the other wrong, and test whether that is chance."""
    from peft_mllm.versus import compare_runs, terminal_table, write_page

    comparison = compare_runs(run_a, run_b, task=task)
    if output is not None:
        write_page(comparison, output, shown=questions)
    if as_json:
        say_json(comparison.to_json() | ({"page": str(output)} if output else {}))
        return
    console.print(terminal_table(comparison))
    for sentence in comparison.sentences():
        console.print(f"\n{sentence}", markup=False)
    if output is not None:
        console.print(f"\nThe page: {output.resolve()}", markup=False)
