"""The verb that runs a finished run again and compares. Nothing here imports torch until it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json

if TYPE_CHECKING:
    from peft_mllm.reproduce import Likeness, Reproduction

verbs = typer.Typer()


@verbs.command(
    epilog=example(
        "peft-mllm reproduce runs/lora",
        "peft-mllm reproduce runs/lora --output runs/lora-on-this-machine",
        "peft-mllm reproduce downloads/their-run --json",
    )
)
def reproduce(
    run: Annotated[Path, typer.Argument(help="A finished run: its directory, with result.json and predictions.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to run it again; RUN-reproduced beside it if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a finished run again from its result.json and compare; exits with 1 where the scores are not the same."""
    from peft_mllm.reproduce import compare_with, rerun
    from peft_mllm.world import World

    again = rerun(run, output, quiet=as_json)
    World().close()  # a process that ends within its group may be aborted by the group's threads
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes, and not the one that speaks
    outcome = compare_with(run, again)
    if as_json:
        say_json(outcome.to_json())
    else:
        _show(outcome)
    if not outcome.reproduced:
        raise typer.Exit(1)


def _show(outcome: Reproduction) -> None:
    from peft_mllm.reproduce import changed, within

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "there", "here", "difference", "95 % interval", "changed", "same"):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for each in outcome.contests:
        low, high = each.difference.low, each.difference.high
        table.add_row(
            each.task,
            f"{each.a.headline:.2f}",
            f"{each.b.headline:.2f}",
            f"{each.difference.value:+.2f}",
            "not known" if low is None or high is None else f"{low:+.2f} to {high:+.2f}",
            f"{len(changed(each))} of {len(each.pairs)}",
            "yes" if within(each) else "no",
        )
    console.print(table)
    console.print(f"\nadapter: {_in_words(outcome.adapter, 'tensors')}", markup=False)
    console.print(f"losses: {_in_words(outcome.losses, 'losses')}", markup=False)
    for name, (there, here) in outcome.environment.items():
        console.print(f"{name}: {there} there, {here} here", markup=False)
    if not outcome.environment:
        console.print("versions, device and threads: the same", markup=False)
    console.print(f"\n{outcome.run}: {outcome.level}. The rerun and reproduction.json: {outcome.again}", markup=False)


def _in_words(likeness: Likeness, what: str) -> str:
    note = f" ({likeness.note})" if likeness.note else ""
    if likeness.equal:
        return f"all {likeness.compared} {what} are the same to the bit{note}"
    if likeness.largest is not None:
        return f"of {likeness.compared} {what} the largest difference is {likeness.largest:.2g}, {likeness.where}{note}"
    return f"not the same{note}" if likeness.equal is False else f"not compared{note}"
