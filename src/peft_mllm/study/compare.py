"""Several results as one table, and what may be concluded from it.

A row is a run. Its score on the new task, its change against the model as it was (zero-shot), and what it
forgot of the seen tasks each have a 95 % interval. A run is called best only where its whole interval lies
above every other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from peft_mllm.study.caveats import caveats
from peft_mllm.study.results import Result
from peft_mllm.study.statistics import Estimate, estimate_difference, estimate_mean, in_unit


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        share: trainable per cent of the model's parameters; None where the model's size is not known.
        score: on the new task; None where the run was not scored on it.
        gain: score minus zero-shot's, paired by question; None without a zero-shot run.
        seen: mean headline of the seen tasks.
        forgotten: zero-shot's mean on the seen tasks minus this run's; negative where it became better.
        unparsed: predictions on the new task that the metric could not read.
        best: told apart from every other trained run.
    """

    run: str
    method: str
    location: str | None
    trainable: int
    share: float | None
    score: Estimate | None
    gain: Estimate | None
    seen: float | None
    forgotten: Estimate | None
    unparsed: int
    questions: int
    seconds: float
    adapter_bytes: int
    zero_shot: bool
    best: bool = False

    @property
    def competes(self) -> bool:
        """Whether it was trained, and scored on the new task."""
        return not self.zero_shot and self.score is not None

    def lies_above(self, other: Row) -> bool:
        """Whether this score's whole interval lies above the other's."""
        return self.score is not None and other.score is not None and self.score.lies_above(other.score)


@dataclass(frozen=True)
class Comparison:
    """The table with what it is about.

    Attributes:
        unit: of scores, gains and forgotten: `%` or nothing.
        notes: what a reader must know before trusting the figures.
    """

    task: str
    seen: tuple[str, ...]
    metric: str
    rule: str
    unit: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Row, ...]:
        """The rows that compete: trained runs with a score."""
        return tuple(row for row in self.rows if row.competes)


def compare(results: Sequence[Result], *, task: str, seen: Sequence[str] = ()) -> Comparison:
    """Compare runs.

    Args:
        results: the runs, in the order of the table's rows. The first zero-shot run is the baseline.
        task: the new task, that the runs were trained on.
        seen: tasks that the base model could already do.
    """
    baseline = next((result for result in results if result.is_zero_shot), None)
    rows = [_row(result, baseline, task, seen) for result in results]
    scored = next((result.scores[task] for result in results if task in result.scores), None)
    return Comparison(
        task=task,
        seen=tuple(seen),
        metric=scored.metric if scored else "",
        rule=scored.rule if scored else "",
        unit=scored.unit if scored else "",
        rows=tuple(_mark_best(rows)),
        notes=tuple(caveats(results, task=task, seen=seen)),
    )


def _row(result: Result, baseline: Result | None, task: str, seen: Sequence[str]) -> Row:
    score = result.scores.get(task)
    against = baseline if baseline is not result else None
    size = result.model.parameters
    return Row(
        run=result.name,
        method=result.method.name,
        location=result.method.location,
        trainable=result.trainable_parameters,
        share=100 * result.trainable_parameters / size if size else None,
        score=_estimate(result, task) if score else None,
        gain=_change(result, against, [task]),
        seen=_mean_headline(result, seen),
        forgotten=_change(against, result, seen),
        unparsed=score.unparsed if score else 0,
        questions=score.n if score else 0,
        seconds=result.seconds,
        adapter_bytes=result.adapter_bytes,
        zero_shot=result.is_zero_shot,
    )


def _estimate(result: Result, task: str) -> Estimate:
    return estimate_mean(_per_question(result, task), value=result.scores[task].headline)


def _mean_headline(result: Result, tasks: Sequence[str]) -> float | None:
    if not tasks or any(task not in result.scores for task in tasks):
        return None
    return sum(result.scores[task].headline for task in tasks) / len(tasks)


def _change(later: Result | None, earlier: Result | None, tasks: Sequence[str]) -> Estimate | None:
    """Mean headline of one run minus another's; without limits where they answered different questions."""
    if later is None or earlier is None:
        return None
    first, second = _mean_headline(later, tasks), _mean_headline(earlier, tasks)
    if first is None or second is None:
        return None
    pairs = [_paired(later, earlier, task) for task in tasks]
    return estimate_difference(pairs, value=first - second)


def _paired(first: Result, second: Result, task: str) -> tuple[Sequence[float], Sequence[float]]:
    """Both runs' scores in the headline's unit, or nothing where their questions are not the same."""
    if _questions(first, task) != _questions(second, task):
        return [], []
    return (
        in_unit(_per_question(first, task), first.scores[task].headline),
        in_unit(_per_question(second, task), second.scores[task].headline),
    )


def _per_question(result: Result, task: str) -> list[float]:
    return [prediction.score for prediction in result.predictions.get(task, ())]


def _questions(result: Result, task: str) -> list[str]:
    return [prediction.id for prediction in result.predictions.get(task, ())]


def _mark_best(rows: Sequence[Row]) -> Iterator[Row]:
    """Mark the run that lies above all other trained ones; one run alone is best of nothing."""
    rivals = [row for row in rows if row.competes]
    for row in rows:
        others = [rival for rival in rivals if rival is not row]
        clear = row.competes and bool(others) and all(row.lies_above(other) for other in others)
        yield replace(row, best=clear)
