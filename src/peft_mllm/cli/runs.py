"""Verbs of runs. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json, show_options, show_scores
from peft_mllm.methods import METHODS

verbs = typer.Typer()

Choices = Literal["generate", "likelihood", "likelihood_sum", "likelihood_chars"]


@verbs.command(
    epilog=example(
        "peft-mllm train spec.yaml",
        "peft-mllm train spec.yaml method=ia3 train.learning_rate=1e-2 output_dir=runs/ia3",
        "peft-mllm train lora.yaml ia3.yaml prefix.yaml",
        "accelerate launch --multi_gpu --num_processes 2 -m peft_mllm train spec.yaml",
    )
)
def train(
    spec: Annotated[Path, typer.Argument(help="YAML file that says what to run; docs/tour.md explains it.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC]... [KEY=VALUE]...",
            help="Further specs of the same base, trained together with it; values that replace the files'.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate a spec, or several of one base together; the same command again resumes."""
    from peft_mllm.run import run
    from peft_mllm.specfile import load_spec
    from peft_mllm.world import World

    others = [Path(each) for each in more or () if _is_spec(each)]
    overrides = [each for each in more or () if not _is_spec(each)]
    if others:
        _train_together([spec, *others], overrides, as_json=as_json)
        return
    read = load_spec(spec, overrides)
    result = run(read)
    World().close()  # a process that ends within its group may be aborted by the group's threads
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes, and not the one that speaks
    if as_json:
        say_json(result)
    else:
        show_scores(result["scores"], result["notes"])
        left = "Result, predictions and adapter" if result["adapter"] else "Result and predictions"
        console.print(f"\n{left}: {read.output_dir}", markup=False)


def _is_spec(argument: str) -> bool:
    """Whether a file is meant, not a value."""
    return "=" not in argument and (argument.endswith((".yaml", ".yml", ".json")) or Path(argument).is_file())


def _train_together(files: list[Path], overrides: list[str], *, as_json: bool) -> None:
    """Run several specs in this process and show each; ends with the first error's code if there is one."""
    from peft_mllm.specfile import load_spec
    from peft_mllm.together import run_together

    specs = [load_spec(file, overrides) for file in files]
    outcomes = run_together(specs)
    results = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    if as_json:
        say_json(results)
    for spec, outcome in zip(specs, outcomes, strict=True) if not as_json else ():
        console.print(f"\n[bold]{escape(spec.title)}[/] ({escape(spec.output_dir)})")
        if isinstance(outcome, dict):
            show_scores(outcome["scores"], outcome["notes"])
    errors = [outcome for outcome in outcomes if not isinstance(outcome, dict)]
    if errors:
        raise errors[0]


@verbs.command(
    epilog=example(
        "peft-mllm evaluate runs/lora",
        "peft-mllm evaluate embedded --task scenes_count --task scenes_row",
        "peft-mllm evaluate runs/lora runs/ia3 embedded --task scenes_count --output scores",
        "peft-mllm evaluate my-adapter --base llava-hf/llava-1.5-7b-hf --task '{name: iconqa_txt, root: data/iconqa}'",
    )
)
def evaluate(
    targets: Annotated[
        list[str], typer.Argument(help="Run directories, models, PEFT directories; those of one base share its load.")
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="A task's name, or YAML with its options; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of a PEFT directory.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Of a base that comes without its own.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for predictions and scores.json; of several targets a folder each.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first questions of each task.")] = None,
    choices: Annotated[
        Choices | None, typer.Option(help="How multiple choice is answered; as the run says if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score runs, bases or PEFT directories; with --output the same command again goes on where it stopped."""
    from peft_mllm.run import notes_on
    from peft_mllm.saved import evaluate_saved, find_target
    from peft_mllm.specfile import parse_value

    tasks = [parse_value(each, "--task") for each in task or ()]
    scores = evaluate_saved(
        targets, tasks, base=base, vision_tower=vision_tower, output_dir=output, limit=limit, choices=choices
    )
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes, and not the one that speaks
    alone = len(targets) == 1
    if as_json:
        say_json(scores[targets[0]] if alone else scores)
        return
    for target in targets:
        if not alone:
            console.print(f"\n[bold]{escape(target)}[/]")
        show_scores(scores[target], notes_on(find_target(target, base).base))


@verbs.command("list", epilog=example("peft-mllm list", "peft-mllm list methods adapter", "peft-mllm list tasks"))
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


@verbs.command(epilog=example("peft-mllm demo", "peft-mllm demo --methods lora,layernorm --output runs/demo"))
def demo(
    methods: Annotated[
        str | None, typer.Option(help=f"The four of the paper if left out; or some of {','.join(METHODS)}.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A generated task that the base has not seen.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the runs and the report.")] = Path("runs/demo"),
) -> None:
    """Compare methods on the embedded base in about a minute, as a study: a table, and a report as one HTML page."""
    from peft_mllm.cli.study import run_and_report
    from peft_mllm.demo import demo_study, next_steps

    run_and_report(demo_study(output, methods=methods.split(",") if methods else (), task=task))
    console.print("\nGo on with:")
    for command, what in next_steps(output):
        console.print(f"  {command}\n      [dim]{what}[/]", soft_wrap=True)
    console.print("  Your own images and questions: docs/own-data.md. Studies: docs/study.md.")
