"""`study plan`: all runs with what they will cost, in one table of a line for each kind of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from peft_mllm.study import wording
from peft_mllm.study.definition import Study
from peft_mllm.study.engine.pool import Pool
from peft_mllm.study.estimate import Estimate, Forecast, forecast, refuse_what_cannot_be_had
from peft_mllm.study.outcomes import NOT_VARIED
from peft_mllm.study.plan import Run
from peft_mllm.study.running import open_study


@dataclass(frozen=True)
class Kind:
    """Runs that differ in task and seed alone.

    Attributes:
        factors: what they share.
        stage: trial or final.
        runs: how many.
        done: how many have a result.
        trainable: parameters that train.
        flops: of training, mean over the runs; None where data is not at hand.
        memory: bytes, the largest.
        seconds: mean over the runs.
    """

    factors: Mapping[str, str]
    stage: str
    runs: int
    done: int
    trainable: int
    flops: float | None
    memory: float | None
    seconds: float | None


@dataclass(frozen=True)
class Costs:
    """A study's forecast.

    Attributes:
        kinds: trials first.
        planned: each run with its estimate.
        open: ids of the runs that have no result yet.
        slots: runs at once on this machine.
        notes: what may not be meant.
    """

    kinds: Sequence[Kind]
    planned: Sequence[tuple[Run, Estimate]]
    open: frozenset[str]
    slots: int
    measured: int
    unknown: Mapping[str, str]
    directory: Path
    notes: tuple[str, ...]

    def total(self, figure: str) -> float | None:
        """Sum of a figure over the open runs; None where one cannot be said."""
        values = [getattr(estimate, figure) for run, estimate in self.planned if run.id in self.open]
        return None if any(value is None for value in values) else float(sum(values))

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        runs = [
            {"id": run.id, "stage": run.stage, "factors": dict(run.factors), "seed": run.seed, "tried": run.tried}
            | {"done": run.id not in self.open, "directory": run.directory}
            | asdict(estimate)
            for run, estimate in self.planned
        ]
        totals = {figure: self.total(figure) for figure in ("flops", "seconds", "disk")}
        rest = {"slots": self.slots, "unknown_data": dict(self.unknown), "notes": list(self.notes)}
        return {"runs": runs, "totals_of_open_runs": totals, **rest}


def planned_costs(study: Study) -> Costs:
    """Plan a study and estimate its runs; where a search is not decided yet, with its first trial's values.

    Raises:
        SpecError: it cannot be planned.
        ModelError: there is no such model, or the hub that should have it cannot be reached.
    """
    state = open_study(study)
    plan = state.plan
    references = {run.spec.model.path: run for run in plan.references}
    for run in references.values():
        refuse_what_cannot_be_had([run.spec.model], _as_directory(study, run))
    known = {(run.stage, *run.factors.items(), run.seed): run for run in state.known()}
    for combination in plan.combinations:
        search = plan.searches.get(plan.search_of(combination))
        for run in plan.finals(combination, search.levels[0] if search else None):
            known.setdefault((run.stage, *run.factors.items(), run.seed), run)
    runs = [*plan.trials, *(run for run in known.values() if run.stage == "final")]
    made: Forecast = forecast(runs, state.finished())
    still = frozenset(run.id for run in runs if not state.is_done(run))
    planned = [(run, made.runs[run.id]) for run in runs]
    return Costs(
        tuple(_kinds(planned, still)),
        planned,
        still,
        Pool().slots,
        made.measured,
        made.unknown,
        state.directory,
        tuple(plan.notes()),
    )


def _as_directory(study: Study, run: Run) -> str:
    """How a study is told to take its model from a directory."""
    if "model" not in study.axes:
        return "fixed.model=DIRECTORY"
    excluded = any("model" in rule for rule in study.exclude)
    return f"'axes.model={{{run.factors['model']}: DIRECTORY}}'{' exclude=[]' if excluded else ''}"


def _kinds(planned: Sequence[tuple[Run, Estimate]], still: frozenset[str]) -> Iterator[Kind]:
    gathered: dict[tuple[Any, ...], list[tuple[Run, Estimate]]] = {}
    for run, estimate in planned:
        gathered.setdefault((run.stage, *_shared(run).items(), estimate.trainable), []).append((run, estimate))
    for group in gathered.values():
        first, estimates = group[0][0], [estimate for _, estimate in group]
        yield Kind(
            factors=_shared(first),
            stage=first.stage,
            runs=len(group),
            done=sum(run.id not in still for run, _ in group),
            trainable=estimates[0].trainable,
            flops=_of(estimates, "flops", _mean),
            memory=_of(estimates, "memory", max),
            seconds=_of(estimates, "seconds", _mean),
        )


def _shared(run: Run) -> dict[str, str]:
    return {axis: label for axis, label in run.factors.items() if axis != "task"}


def _of(estimates: Sequence[Estimate], figure: str, what: Callable[[list[float]], float]) -> float | None:
    values = [value for each in estimates if (value := getattr(each, figure)) is not None]
    return what(values) if values else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plan_table(costs: Costs) -> Table:
    """A line for each kind of run."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    axes = list(dict.fromkeys(axis for kind in costs.kinds for axis in kind.factors))
    varied = [axis for axis in axes if len({kind.factors[axis] for kind in costs.kinds} - {NOT_VARIED}) > 1]
    table.add_column(escape(" · ".join(varied)), overflow="fold")
    for heading in ("runs", "done", "trainable", "FLOPs each", "memory each", "time each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in costs.kinds:
        labels = [kind.factors[axis] for axis in varied if kind.factors[axis] != NOT_VARIED]
        table.add_row(
            escape(" · ".join([*(["trial"] if kind.stage == "trial" else []), *labels])),
            str(kind.runs),
            str(kind.done) if kind.done else "",
            wording.count(kind.trainable),
            f"{kind.flops:.1e}" if kind.flops else wording.NOTHING,
            wording.size(round(kind.memory)) if kind.memory else wording.NOTHING,
            wording.duration(kind.seconds) if kind.seconds else wording.NOTHING,
        )
    return table


def total_line(costs: Costs) -> Iterator[str]:
    """What is left to do, and on what the estimate rests."""
    if not costs.open:
        yield f"All {len(costs.planned)} runs are done, in {costs.directory}."
        yield from costs.notes
        return
    flops, seconds, disk = (costs.total(figure) for figure in ("flops", "seconds", "disk"))
    parts = [f"{len(costs.open)} of {len(costs.planned)} runs to do"]
    parts += [f"{flops:.2e} FLOPs"] if flops is not None else []
    if seconds is not None:
        at_once = f"{costs.slots} at once" if costs.slots > 1 else "one at a time"
        parts.append(f"about {wording.duration(seconds / costs.slots)} on this machine ({at_once})")
    parts += [f"{wording.size(round(disk))} of disk in {costs.directory}"] if disk else []
    yield ", ".join(parts)
    yield (
        f"Time from {costs.measured} finished runs of this study."
        if costs.measured
        else "Time is a rough guess from this machine's speed; it becomes a measurement when the first runs are done."
    )
    yield (
        "Memory is that of a whole micro-batch at once; a run with less computes it in parts. The libraries take some "
        "hundred MB beside it."
    )
    for task, reason in costs.unknown.items():
        yield f"Without the data of {task} nothing can be said of its runs: {reason}"
    yield from costs.notes
