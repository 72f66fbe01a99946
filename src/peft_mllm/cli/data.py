"""Verbs of data. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import EXIT_BAD_DATA

verbs = typer.Typer(help="Look at data before training.", no_args_is_help=True)


@verbs.command(
    "check",
    epilog=example(
        "peft-mllm data check train.jsonl",
        "peft-mllm data check train.json --image-root images --model llava-hf/llava-1.5-7b-hf --quarantine",
    ),
)
def data_check(
    file: Annotated[Path, typer.Argument(help="LLaVA JSON, or JSON lines with messages.")],
    image_root: Annotated[
        Path | None, typer.Option(help="Folder below which all images lie; the file's own if left out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also find samples that are too long for this model.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="With --model: tokens that fit.")] = 2048,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Write bad records and good ones to files of their own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every record and image before a GPU does; exit 65 when something cannot be used."""
    from peft_mllm.data.check import check
    from peft_mllm.data.formats import RecordFile
    from peft_mllm.data.quarantine import quarantine as write_aside
    from peft_mllm.screen import Screen

    records = RecordFile(file, image_root=image_root)
    measure = measure_for(model, max_length) if model else None
    with Screen().bar("checking", len(records)) as bar:
        report = check(records, measure=measure, progress=lambda done, of: bar.advance(to=done))
    if as_json:
        say_json(report.to_json())
    else:
        for finding in report.findings:
            console.print(str(finding), markup=False)
        console.print(report.summary(), markup=False)
    if quarantine:
        written = write_aside(report, records, file.parent)
        for path in (written.clean, written.quarantine):
            Console(stderr=True, soft_wrap=True).print(f"wrote {path}", markup=False)
    if not report.ok:
        raise typer.Exit(EXIT_BAD_DATA)


def measure_for(model: str, max_length: int) -> Any:
    """The measure of records by a model's tokenizer and templates."""
    from peft_mllm.data.supply import measure_with
    from peft_mllm.loading import load_family
    from peft_mllm.spec import ModelSpec

    return measure_with(load_family(ModelSpec(path=model), dtype="auto").encode, max_length)
