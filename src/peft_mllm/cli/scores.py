"""The verb `score`: official files in, figures and the name of the rule out. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import SpecError
from peft_mllm.metrics import METRICS, metric_named

if TYPE_CHECKING:
    from peft_mllm.metrics import Metric
    from peft_mllm.scoring import Scored

verbs = typer.Typer()

_MANY = ("--predictions", "--references", "--questions")


class ManyFiles(TyperCommand):
    """A command whose options for files take one or more: `--references a b` is `--references a --references b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further file; a metric's name that is still awaited is none."""
        spread: list[str] = []
        option, values, metric = "", 0, False
        for arg in args:
            if arg.startswith("-"):
                option, values = (arg if arg in _MANY else ""), 0
            elif not metric and arg.partition(":")[0] in METRICS and not (option and values == 0):
                metric = True
            else:
                if option and values:
                    spread.append(option)
                metric = metric or not (option or spread)
                values += 1
            spread.append(arg)
        return super().parse_args(ctx, spread)


@verbs.command(
    cls=ManyFiles,
    epilog=example(
        "peft-mllm score vqa --predictions results.json --references v2_mscoco_val2014_annotations.json",
        "peft-mllm score vqa --variant m4c --predictions answers.jsonl --references TextVQA_0.5.1_val.json --json",
        "peft-mllm score pope --predictions answers.jsonl --questions pope.jsonl --references coco_pope_*.json",
    ),
)
def score(
    metric: Annotated[str, typer.Argument(help=f"One of {', '.join(METRICS)}.")],
    predictions: Annotated[list[Path], typer.Option(help="What a model answered, in an official format.")],
    references: Annotated[list[Path], typer.Option(help="What it is scored against; more than one for some.")],
    questions: Annotated[list[Path] | None, typer.Option(help="What was asked, where the answers do not say.")] = None,
    variant: Annotated[str | None, typer.Option(help="Another rule than the first; see docs/metrics.md.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score the ids that both sides have, and say so.")] = False,
    per_item: Annotated[Path | None, typer.Option(help="Write one JSON line for each item to this file.")] = None,
    judge: Annotated[str | None, typer.Option(help="mmhal: an OpenAI-compatible endpoint, http://host/v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="mmhal: the judge's name there.")] = None,
    as_json: Json = False,
) -> None:
    """Score files of predictions by the official rule, or another that is named."""
    from peft_mllm.files import write_lines
    from peft_mllm.metrics import Given
    from peft_mllm.scoring import score_files

    name, _, named = metric.partition(":")
    if named and variant and named != variant:
        raise SpecError(f"Two variants are given, '{named}' and '{variant}'. Give one.")
    chosen = variant or named
    rule = metric_named(f"{name}:{chosen}" if chosen else name)
    _set_judge(rule, judge, judge_model)
    if per_item and per_item.resolve() in {file.resolve() for file in (*predictions, *references, *(questions or ()))}:
        raise SpecError(f"--per-item would overwrite {per_item}, which is one of the files that are read.")
    scored = score_files(name, rule, Given(predictions, references, questions or (), partial))
    if per_item:
        write_lines(per_item, scored.lines(), what="the items")
    if as_json:
        say_json(scored.to_json())
    else:
        _show(scored)


def _show(scored: Scored) -> None:
    """The figures as a table, with the rule above."""
    said = scored.to_json()
    console.print(said["rule"], markup=False)
    console.print(f"{said['n']} scored, {said['unparsed']} not understood; unit: {scored.metric.unit}", markup=False)
    if scored.unused:
        console.print(f"{scored.unused} references have no prediction, which this rule allows.", markup=False)
    if scored.partial:
        console.print(
            f"PARTIAL: {said['missing']} references without a prediction, {said['extra']} predictions without a "
            "reference are left out.",
            markup=False,
        )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    digits = 2 if scored.metric.unit == "per cent" else 4
    for figure, value in said["scores"].items():
        table.add_row(figure, f"{value:.{digits}f}")
    console.print(table)


def _set_judge(metric: Metric, url: str | None, model: str | None) -> None:
    if url is None and model is None:
        return
    from peft_mllm.metrics.judge import KEY_VARIABLE, Judge
    from peft_mllm.metrics.mmhal import MMHal

    if not isinstance(metric, MMHal):
        raise SpecError("--judge and --judge-model are for the metric mmhal alone.")
    if not url or not model:
        raise SpecError("A judge is an endpoint and a model: give both --judge URL and --judge-model NAME.")
    metric.judge = Judge(url, model, os.environ.get(KEY_VARIABLE))
