"""The command line: verbs only. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from peft_mllm.errors import EXIT_BAD_DATA, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, RESUME, UserError
from peft_mllm.methods import METHODS

app = typer.Typer(
    help="Fine-tune multimodal LLMs with parameter-efficient methods, evaluate and compare them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data before training.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def example(*lines: str) -> str:
    """An epilogue with commands to copy."""
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


@app.command(
    epilog=example(
        "peft-mllm train spec.yaml",
        "peft-mllm train spec.yaml method=ia3 train.learning_rate=1e-2 output_dir=runs/ia3",
        "accelerate launch --multi_gpu --num_processes 2 -m peft_mllm train spec.yaml",
    )
)
def train(
    spec: Annotated[Path, typer.Argument(help="YAML file that says what to run; docs/tour.md explains it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate one spec; the same command again resumes it."""
    from peft_mllm.run import run
    from peft_mllm.specfile import load_spec

    read = load_spec(spec, overrides or ())
    result = run(read)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes, and not the one that speaks
    if as_json:
        say_json(result)
    else:
        show_scores(result["scores"], result["notes"])
        left = "Result, predictions and adapter" if result["adapter"] else "Result and predictions"
        console.print(f"\n{left}: {read.output_dir}", markup=False)


@app.command(
    epilog=example(
        "peft-mllm evaluate runs/lora",
        "peft-mllm evaluate embedded --task scenes_count --task scenes_row",
        "peft-mllm evaluate my-adapter --base llava-hf/llava-1.5-7b-hf --task '{name: iconqa_txt, root: data/iconqa}'",
    )
)
def evaluate(
    target: Annotated[str, typer.Argument(help="A run directory, a model, or a PEFT directory.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task's name, or YAML with its options; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of a PEFT directory.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for predictions and scores.json.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first questions of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Score a run, a base, or a PEFT directory on a base."""
    from peft_mllm.run import notes_on
    from peft_mllm.saved import evaluate_saved, find_target
    from peft_mllm.specfile import parse_value

    tasks = [parse_value(each, "--task") for each in task or ()]
    scores = evaluate_saved(target, tasks, base=base, output_dir=output, limit=limit)
    if as_json:
        say_json(scores)
    else:
        show_scores(scores, notes_on(find_target(target, base).base))


@data_app.command(
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


@app.command("list", epilog=example("peft-mllm list", "peft-mllm list methods adapter", "peft-mllm list tasks"))
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, models, tasks or metrics; all if left out.")] = None,
    name: Annotated[str | None, typer.Argument(help="Also show this one's options.")] = None,
    as_json: Json = False,
) -> None:
    """Show what there is: one line each, and the options of one."""
    from peft_mllm.listing import SHELVES, describe, shelf_of

    kinds = [kind] if kind else list(SHELVES)
    names = {each: [name] if name else list(shelf_of(each)) for each in kinds}
    if as_json:
        shown = {each: {key: describe(shelf_of(each), key) for key in keys} for each, keys in names.items()}
        say_json(shown[kind] if kind else shown)
        return
    for each, keys in names.items():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title=None if kind else f"\n{each}")
        for key in keys:
            table.add_row(f"[bold]{key}[/]", shelf_of(each).summary(key))
        console.print(table)
    if kind and name:
        show_options(describe(shelf_of(kind), name)["options"])
    else:
        console.print("\nOptions of one: peft-mllm list methods NAME, peft-mllm list tasks NAME", markup=False)


@app.command(epilog=example("peft-mllm demo", "peft-mllm demo --methods lora,layernorm --output runs/demo"))
def demo(
    methods: Annotated[
        str | None, typer.Option(help=f"The four of the study if left out; or some of {','.join(METHODS)}.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A generated task that the base has not seen.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the runs and the page.")] = Path("runs/demo"),
) -> None:
    """Compare methods on the embedded base in minutes: a table, and one HTML page."""
    from peft_mllm.demo import run_demo

    page = run_demo(output, methods=methods.split(",") if methods else None, task=task)
    console.print(f"\nThe page: {page}", markup=False, soft_wrap=True)


console = Console(highlight=False, soft_wrap=True)


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


TYPER_CTRL_C = 130
"""What typer makes of a KeyboardInterrupt."""


def main() -> NoReturn:
    """Run a verb; a user's mistake is one message, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # the libraries' notices to developers
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        fail(str(error), error.exit_code)
    except typer.Abort:
        fail("Stopped.", EXIT_INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is None:
            Console(stderr=True).print_exception()
            fail(
                "This is a defect of peft-mllm, not yours: please report it with the lines above.",
                EXIT_INTERNAL,
            )
        error.show() if hasattr(error, "show") else None
        sys.exit(usage or EXIT_USAGE)
    if code == TYPER_CTRL_C:
        fail(f"Stopped at once; {RESUME}", EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to standard error and end with a code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
    sys.exit(code)
