"""The verb that makes a task's folder from a data set's release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import SpecError

verbs = typer.Typer()


@verbs.command(
    "prepare",
    epilog=example(
        "peft-mllm data prepare --list",
        "peft-mllm data prepare vizwiz --source downloads/vizwiz",
        "peft-mllm data prepare textvqa --source downloads --split test --limit 100",
        "peft-mllm data prepare okvqa --hub --split test",
    ),
)
def data_prepare(
    task: Annotated[str | None, typer.Argument(help="Whose data set; --list shows them.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder with the files as published: archives, or what they unpack to.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of all data sets; the task's goes into it.")] = Path("datasets"),
    hub: Annotated[
        bool, typer.Option("--hub", help="Read by the `datasets` library: from the hub, or --source as saved by it.")
    ] = False,
    split: Annotated[
        list[str] | None, typer.Option(help="train, validation or test; may be repeated; all if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each split.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Go on where the release is not whole; results then say so.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Of the conversations for other programs (LLaVA and Qwen-VL JSON).")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show each data set: where to get it, size, licence.")] = False,
    as_json: Json = False,
) -> None:
    """Make one folder of a data set's release: checked, resumable, the `root` of its task."""
    from peft_mllm.preparing import catalogue, prepare_task

    if listed:
        say_json(catalogue()) if as_json else _show(catalogue())
        return
    if task is None:
        raise SpecError("Say which: `peft-mllm data prepare TASK --source FOLDER`; --list shows the tasks.")
    manifest = prepare_task(
        task, source, output=output, hub=hub, splits=split or (), limit=limit, partial=partial, prompt=prompt
    )
    if as_json:
        say_json(manifest)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("split", "questions", "of", "images", "left out"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for official, each in manifest["splits"].items():
        counts = (each[key] for key in ("questions", "found", "images", "left_out"))
        table.add_row(official, *(f"{count:,}" for count in counts))
    console.print(table)
    if manifest["partial"]:
        console.print("This is a part of the release; results on it say so.", markup=False)
    console.print(
        f"\nEvaluate: peft-mllm evaluate MODEL --task '{{name: {manifest['task']}, root: {manifest['folder']}}}'",
        markup=False,
    )


def _show(found: list[dict[str, Any]]) -> None:
    """One paragraph each, to be copied from."""
    for each in found:
        sizes = ", ".join(_size(name, split) for name, split in each["splits"].items())
        console.print(f"[bold]{each['task']}[/]  {each['title']} ({each['paper']})", soft_wrap=True)
        for word, text in (("splits", sizes), ("size", each["size"]), ("licence", each["licence"])):
            console.print(f"  {word}: {text}", markup=False)
        console.print(f"  from: {each['home']}", markup=False)
        for file in each["downloads"]:
            console.print(f"    {file['file']}  {file['url']}", markup=False)
        if each["hub"]:
            console.print(f"  hub: {each['hub']} (--hub)", markup=False)
        console.print()


def _size(name: str, split: dict[str, Any]) -> str:
    number = "number not stated" if split["number"] is None else f"{split['number']:,}"
    official = "" if split["official"] == name else f" ({split['official']})"
    return f"{name}{official} {number} {split['unit'] if split['number'] else ''}".strip()
