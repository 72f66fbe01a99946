"""Verbs of studies. Nothing here imports torch but `plan`, which counts what would train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json

if TYPE_CHECKING:
    from peft_mllm.study.definition import Study
    from peft_mllm.study.running import Machines

verbs = typer.Typer(help="Plan, run and report whole studies.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="YAML file of the study; docs/study.md explains it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, such as axes.seed=[1,2,3]."),
]


@verbs.command(
    epilog=example(
        "peft-mllm study plan studies/main-tiny.yaml",
        "peft-mllm study plan studies/main.yaml axes.model=[liuhaotian/llava-v1.5-7b] --json",
    )
)
def plan(study: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show the runs with what they will cost, before anything starts."""
    from peft_mllm.study.definition import load_study
    from peft_mllm.study.forecasting import plan_table, planned_costs, total_line

    costs = planned_costs(load_study(study, overrides or ()))
    if as_json:
        say_json(costs.to_json())
        return
    console.print(plan_table(costs))
    for line in total_line(costs):
        console.print(line, markup=False)


@verbs.command(
    epilog=example(
        "peft-mllm study run studies/main-tiny.yaml",
        "peft-mllm study run studies/main-tiny.yaml axes.seed=[1,2,3,4]",
        "peft-mllm study run studies/main.yaml --engine ray --address auto",
    )
)
def run(
    study: File,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="pool: processes here; ray: one machine or many.")] = "pool",
    slots: Annotated[int | None, typer.Option(min=1, help="Runs at once; one per GPU, or per core.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each run; 1 on a CPU.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; one is started here if left out.")] = None,
    together: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of one base in one process; 8 small ones without a GPU, else 1."),
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Failures after which a run is set aside.")] = 3,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what was set aside.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the report at the end.")] = True,
    as_json: Json = False,
) -> None:
    """Run what has no verified result; the same command again goes on where it stopped, on any machine."""
    from peft_mllm.errors import SpecError
    from peft_mllm.study.definition import load_study
    from peft_mllm.study.running import Machines

    if engine not in ("pool", "ray"):
        raise SpecError(f"--engine {engine}: there are pool and ray.")
    if address is not None and engine != "ray":
        raise SpecError("--address is of a Ray cluster; say --engine ray, too.")
    if together is not None and engine == "ray":
        raise SpecError("--together is of a pool; on Ray every run has a process of its own.")
    read = load_study(study, overrides or ())
    machines = Machines(
        engine="ray" if engine == "ray" else "pool", slots=slots, threads=threads, address=address, together=together
    )
    run_and_report(read, machines, attempts=attempts, retry=retry, report=report, as_json=as_json)


def run_and_report(
    study: Study,
    machines: Machines | None = None,
    *,
    attempts: int = 3,
    retry: bool = False,
    report: bool = True,
    as_json: bool = False,
) -> None:
    """Run a study and say what was found; ends with an error if a run was set aside."""
    from peft_mllm.errors import EXIT_INTERNAL
    from peft_mllm.study.running import Machines, run_study

    progress = Console(stderr=True, highlight=False)
    conducted = run_study(study, machines or Machines(), attempts=attempts, retry=retry, console=progress)
    page = _write_report(Path(study.output_dir), None, summary=not as_json) if report else None
    if as_json:
        said: dict[str, Any] = {"done": list(conducted.done), "set_aside": dict(conducted.failed)}
        say_json(said | {"waiting": conducted.waiting, "report": str(page) if page else None})
    else:
        console.print(f"{len(conducted.done)} runs done now, {len(conducted.failed)} set aside.", markup=False)
        for name, cause in conducted.failed.items():
            console.print(f"  {name}: {cause}", markup=False)
        if page:
            console.print(f"The report: {page.resolve()}", markup=False)
    if conducted.failed:
        raise typer.Exit(EXIT_INTERNAL)


@verbs.command(epilog=example("peft-mllm study status studies/main-tiny.yaml"))
def status(study: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show how the runs stand: done, running, failed, set aside, waiting."""
    from peft_mllm.study.attempts import ATTEMPTS_FOLDER
    from peft_mllm.study.definition import load_study
    from peft_mllm.study.engine import status_of
    from peft_mllm.study.running import made_otherwise, open_study

    read = load_study(study, overrides or ())
    state, otherwise = open_study(read), made_otherwise(read)
    known = state.known()
    standing = status_of([state.job(run) for run in known], state.directory / ATTEMPTS_FOLDER)
    counts = Counter(each.state for each in standing)
    later = state.plan.expected - len(known)
    if as_json:
        noted = {"note": otherwise} if otherwise else {}
        runs = [vars(each) for each in standing]
        say_json({"expected": state.plan.expected, "not_known_yet": later, **counts, "runs": runs, **noted})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "state", "where", "cause"):
        table.add_column(heading, overflow="fold")
    for each in standing:
        if each.state in ("running", "failed", "set aside", "interrupted"):
            step = f"{each.stage} {each.step or ''}/{each.total or ''}" if each.state == "running" else ""
            table.add_row(escape(each.title), each.state, escape(f"{each.host} {step}".strip()), escape(each.cause))
    if table.row_count:
        console.print(table)
    said = [f"{count} {name}" for name, count in counts.items()]
    said += [f"{later} not known before their trials are done"] if later else []
    console.print(f"{state.plan.expected} runs: {', '.join(said)}", markup=False)
    if otherwise:
        console.print(f"Note: {otherwise}", markup=False)


@verbs.command(
    epilog=example(
        "peft-mllm study report studies/main-tiny.yaml",
        "peft-mllm study report runs/lights --output runs/lights-report",
        "peft-mllm study report results.csv",
    )
)
def report(
    study: Annotated[Path, typer.Argument(help="YAML file of a study, a folder of runs, or a CSV or TSV of results.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory of the report; report in the study's, TABLE-report beside a table.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report from result files alone: a page, tables and figures."""
    from peft_mllm.study.columns import ENDINGS
    from peft_mllm.study.definition import load_study
    from peft_mllm.study.running import made_otherwise

    otherwise = ""
    if study.suffix.lower() in ENDINGS:
        results, output = study, output or study.with_name(f"{study.stem}-report")
    elif study.is_dir():
        results = study
    else:
        read = load_study(study)
        results, otherwise = Path(read.output_dir), made_otherwise(read)
    page = _write_report(results, output, summary=not as_json)
    if as_json:
        say_json({"report": str(page)} | ({"note": otherwise} if otherwise else {}))
        return
    console.print(f"The report: {page.resolve()}", markup=False)
    if otherwise:
        console.print(f"Note: {otherwise}", markup=False)


def _write_report(results: Path, output: Path | None, *, summary: bool) -> Path:
    from peft_mllm.study.analyse import analyse
    from peft_mllm.study.pages.write import write_study_report
    from peft_mllm.study.sources import read_any
    from peft_mllm.study.tables.terminal import terminal_summary

    analysis = analyse(read_any(results))
    page = write_study_report(analysis, output or results / "report")
    if summary:
        console.print(terminal_summary(analysis), soft_wrap=False)
    return page
