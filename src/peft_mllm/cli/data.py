"""Verbs of data. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import EXIT_BAD_DATA, DataError

verbs = typer.Typer(help="Look at data before training.", no_args_is_help=True)

Format = Literal["llava", "qwen", "messages", "hf"]
File = Annotated[Path, typer.Argument(help="LLaVA or Qwen-VL JSON, JSON lines with messages, or a table.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder below which all images lie; the file's own if left out.")]


@verbs.command(
    "check",
    epilog=example(
        "peft-mllm data check train.jsonl",
        "peft-mllm data check train.json --image-root images --model llava-hf/llava-1.5-7b-hf --quarantine",
        "peft-mllm data check train.json --against test.json --quarantine",
    ),
)
def data_check(
    file: File,
    image_root: ImageRoot = None,
    model: Annotated[
        str | None, typer.Option(help="Also find what is too long for this model, and its control tokens in text.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A test file that must share no question; images are told by content.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="With --model: tokens that fit.")] = 2048,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Write bad records and good ones to files of their own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every record and image before a GPU does; exit 65 when something cannot be used."""
    from peft_mllm.data.check import check
    from peft_mllm.data.formats import RecordFile
    from peft_mllm.data.opening import open_records
    from peft_mllm.data.quarantine import quarantine as write_aside
    from peft_mllm.screen import Screen

    records = open_records(file, image_root=image_root)
    if quarantine and not isinstance(records, RecordFile):
        raise DataError(f"{file} is a table: --quarantine parts JSON files. Convert it first: peft-mllm data convert.")
    measure, specials = reading_of(model, max_length) if model else (None, None)
    other = against_file(against, image_root)
    with Screen().bar("checking", len(records)) as bar:
        report = check(
            records, measure=measure, specials=specials, against=other, progress=lambda done, of: bar.advance(to=done)
        )
    if as_json:
        say_json(report.to_json())
    else:
        for finding in report.findings:
            console.print(str(finding), markup=False)
        console.print(report.summary(), markup=False)
    if quarantine and isinstance(records, RecordFile):
        written = write_aside(report, records, file.parent)
        for path in (written.clean, written.quarantine):
            Console(stderr=True, soft_wrap=True).print(f"wrote {path}", markup=False)
    if not report.ok:
        raise typer.Exit(EXIT_BAD_DATA)


@verbs.command(
    "preview",
    epilog=example(
        "peft-mllm data preview train.jsonl --model embedded",
        "peft-mllm data preview train.json --image-root images --model Qwen/Qwen-VL-Chat --output train.html",
    ),
)
def data_preview(
    file: File,
    model: Annotated[str, typer.Option(help="Whose tokens and pixels are shown; its weights are not read.")],
    image_root: ImageRoot = None,
    limit: Annotated[int, typer.Option(min=0, help="Records that are shown token by token.")] = 20,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens that fit.")] = 2048,
    against: Annotated[Path | None, typer.Option(help="A test file that must share no question.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The page; the file's name with .preview.html if left out.")
    ] = None,
) -> None:
    """Write a page that shows the data as a model reads it: images, tokens, what is learned, lengths, findings."""
    from peft_mllm.data.opening import open_records
    from peft_mllm.files import atomic_write
    from peft_mllm.loading import load_family
    from peft_mllm.preview.content import gather
    from peft_mllm.preview.page import render
    from peft_mllm.screen import Screen
    from peft_mllm.spec import ModelSpec

    records = open_records(file, image_root=image_root)
    family = load_family(ModelSpec(path=model), dtype="auto", weights=False)
    other = against_file(against, image_root)
    with Screen().bar("reading", len(records)) as bar:
        content = gather(
            records, family, model=model, limit=limit, max_length=max_length, against=other,
            progress=lambda done, of: bar.advance(to=done),
        )  # fmt: skip
    page = output or file.with_name(f"{file.name.removesuffix(file.suffix)}.preview.html")
    atomic_write(page, render(content), what="the preview")
    console.print(content.report.summary(), markup=False)
    console.print(f"The page: {page}", markup=False)


def against_file(file: Path | None, image_root: Path | None) -> Any:
    """What another file asks, to be held against; None without one."""
    from peft_mllm.data.leakage import Against
    from peft_mllm.data.opening import open_records
    from peft_mllm.screen import Screen

    if file is None:
        return None
    records = open_records(file, image_root=image_root)
    with Screen().bar(f"reading {file.name}", len(records)) as bar:
        return Against(records, progress=lambda done, of: bar.advance(to=done))


def reading_of(model: str, max_length: int) -> tuple[Any, Any]:
    """How a model measures records, and its special tokens; its weights stay where they are."""
    from peft_mllm.data.specials import Specials
    from peft_mllm.data.supply import measure_with
    from peft_mllm.loading import load_family
    from peft_mllm.spec import ModelSpec

    family = load_family(ModelSpec(path=model), dtype="auto", weights=False)
    return measure_with(family.encode, max_length), Specials(family.encode, family.tokenizer)


@verbs.command(
    "convert",
    epilog=example(
        "peft-mllm data convert train.json train.jsonl --to messages",
        "peft-mllm data convert qwen.json llava.json --to llava --image-root images",
        "peft-mllm data convert train.json train.parquet --to hf",
    ),
)
def data_convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Records in any of the formats, told by content.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new file; of hf a .parquet file or a directory.")],
    to: Annotated[Format, typer.Option(help="llava, qwen, messages (JSON lines) or hf (a table with its images).")],
    image_root: ImageRoot = None,
    as_json: Json = False,
) -> None:
    """Write records in another format; what that cannot hold is an error, never a loss."""
    from peft_mllm.data.convert import convert
    from peft_mllm.data.opening import open_records
    from peft_mllm.screen import Screen

    records = open_records(source, image_root=image_root)
    with Screen().bar("converting", len(records)) as bar:
        done = convert(records, target, to, progress=lambda n, of: bar.advance(to=n))
    if as_json:
        say_json({key: value and str(value) for key, value in asdict(done).items()} | {"records": done.records})
        return
    console.print(f"{done.path}: {done.records:,} records", markup=False)
    if done.images is not None:
        console.print(f"{done.images}: their images", markup=False)
    elif done.image_root is not None and done.image_root != target.resolve().parent:
        console.print(f"Its image paths are relative to {done.image_root}: use it with --image-root.", markup=False)
