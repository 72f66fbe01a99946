"""From a study's directory to its outcomes: the index says what each run stands for, its files what it found.

A folder of runs without an index is a study too: what differs between the specs becomes its axes (inferring.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_mllm.study.analysis import Trial
from peft_mllm.study.attempts import ATTEMPTS_FOLDER, Attempts
from peft_mllm.study.hallucination import hallucinations
from peft_mllm.study.index import FILE as INDEX
from peft_mllm.study.index import Index, Planned, read_index
from peft_mllm.study.inferring import infer
from peft_mllm.study.ledger import figures_of
from peft_mllm.study.outcomes import NOT_VARIED, Answers, CurvePoint, Outcome
from peft_mllm.study.results import FILE as RESULT
from peft_mllm.study.results import Predictions, Result, Score, find_results, read_result

VALIDATION = "validation"
ALIKE = 1e-6
"""Relative: a headline so near to 1 or 100 times the mean score differs from it by rounding alone."""


@dataclass(frozen=True)
class StudyResults:
    """What a study's directory holds.

    Attributes:
        outcomes: the runs that count, in the order of the study's labels and seeds.
        trials: of the search, likewise.
        failed: runs that were set aside, in words, with the cause.
        missing: how many planned runs have no result and were not set aside.
        notes: on the reading itself.
    """

    index: Index
    outcomes: tuple[Outcome, ...]
    trials: tuple[Trial, ...]
    failed: tuple[tuple[str, str], ...]
    missing: int
    notes: tuple[str, ...] = ()


def read_study(directory: Path, *, seen: Sequence[str] | None = None) -> StudyResults:
    """Read a study, or any folder of runs.

    Args:
        directory: of a study, or with run directories below it.
        seen: tasks that the base could already do, in place of what the study says.

    Raises:
        DataError: there is neither; or a file does not fit, with file and field.
    """
    if (directory / INDEX).is_file():
        index, notes = read_index(directory), list[str]()
        there = {each.directory: directory / each.directory for each in index.runs}
        found = {name: read_result(path) for name, path in there.items() if (path / RESULT).is_file()}
    else:
        found = {path.relative_to(directory).as_posix(): read_result(path) for path in find_results(directory)}
        found, left_out = _scored_alike(found)
        index, notes = infer(directory, found)
        notes += left_out
    index = replace(index, seen=tuple(index.seen if seen is None else seen))
    return _gathered(directory, index, found, notes)


def _scored_alike(found: Mapping[str, Result]) -> tuple[dict[str, Result], list[str]]:
    """The runs that were scored on test data, and what is to be said of the rest: their scores are of another kind."""
    trials = [name for name, result in found.items() if result.spec.get("scored") == VALIDATION]
    if len(trials) == len(found):
        said = "All scores are of validation data: `scored: validation` in the specs." if trials else ""
        return dict(found), [said] if said else []
    kept = {name: result for name, result in found.items() if name not in trials}
    runs = "1 run" if len(trials) == 1 else f"{len(trials)} runs"
    said = f"Left out: {runs} scored on validation data (`scored: validation`), as trials of a search are."
    return kept, [said] if trials else []


def _gathered(directory: Path, index: Index, found: Mapping[str, Result], notes: Sequence[str]) -> StudyResults:
    order = order_of(index.axes)
    runs = sorted(index.runs, key=lambda each: (order(each.factors), each.seed or 0, each.tried, each.directory))
    labels = _labels(runs, found)
    share = _Shared()
    describing = _describing(found.values())
    done = [(each, found[each.directory]) for each in runs if each.directory in found]
    failed = _failed(directory / ATTEMPTS_FOLDER, [each for each in runs if each.directory not in found])
    return StudyResults(
        index=replace(index, seen=tuple(labels.get(name, name) for name in index.seen)),
        outcomes=tuple(
            _outcome(run, result, labels, share, describing) for run, result in done if run.stage == "final"
        ),
        trials=tuple(_trial(run, result) for run, result in done if run.stage == "trial"),
        failed=failed,
        missing=max(max(index.expected, len(runs)) - len(done) - len(failed), 0),
        notes=tuple(notes),
    )


def order_of(axes: Mapping[str, Sequence[str]]) -> Callable[[Mapping[str, str]], tuple[tuple[int, str], ...]]:
    """A key that sorts factors by the study's order of labels, whatever the order in which runs ended."""
    places = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in axes.items()}

    def key(factors: Mapping[str, str]) -> tuple[tuple[int, str], ...]:
        names = [*axes, *sorted(factors.keys() - axes.keys())]
        return tuple(_place(places.get(axis, {}), factors.get(axis, NOT_VARIED)) for axis in names)

    return key


def _place(places: Mapping[str, int], label: str) -> tuple[int, str]:
    """What varies not comes first, what the study does not list last."""
    return (-1, "") if label == NOT_VARIED else (places.get(label, len(places)), label)


def _failed(folder: Path, runs: Iterable[Planned]) -> tuple[tuple[str, str], ...]:
    if not folder.is_dir():
        return ()
    attempts = Attempts(folder)
    causes = [(each, attempts.set_aside(each.id)) for each in runs]
    return tuple((in_words(each), " ".join(cause.split())) for each, cause in causes if cause is not None)


def in_words(run: Planned) -> str:
    """A run by its labels."""
    labels = [label for label in run.factors.values() if label != NOT_VARIED]
    seed = [] if run.seed is None else [f"seed {run.seed}"]
    return " \N{MIDDLE DOT} ".join([*labels, *([f"trial: {run.tried}"] if run.stage == "trial" else seed)])


def _labels(runs: Sequence[Planned], found: Mapping[str, Result]) -> dict[str, str]:
    """The study's label of each task's name, where one name has one label."""
    labels: dict[str, set[str]] = {}
    for each in runs:
        if each.directory in found and each.factors.get("task", NOT_VARIED) != NOT_VARIED:
            labels.setdefault(_trained(found[each.directory]), set()).add(each.factors["task"])
    return {name: next(iter(known)) for name, known in labels.items() if len(known) == 1}


def _describing(results: Iterable[Result]) -> str | None:
    """The task on which most runs measure hallucination: figures of two tasks must not be compared."""
    counts = Counter(task for result in results for task in hallucinations(result))
    return min(counts, key=lambda task: (-counts[task], task), default=None)


def _trained(result: Result) -> str:
    """The name of the task that a run was trained on, or is the zero-shot row of."""
    task = result.spec.get("task")
    name = task.get("name") if isinstance(task, Mapping) else task
    return str(name) if name else next(iter(result.scores), "")


def _trial(run: Planned, result: Result) -> Trial:
    score = result.scores.get(_trained(result))
    return Trial(run.factors, run.tried, score.headline if score else None, run.chosen, _name(run))


def _name(run: Planned) -> str:
    """What a reader is referred to."""
    return run.directory.removeprefix("runs/") or "."


# --- one run ---


class _Shared:
    """Equal ids of questions are one object, so that a thousand runs hold them, and compare them, once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __call__(self, ids: tuple[str, ...]) -> tuple[str, ...]:
        return self._known.setdefault(ids, ids)


def _outcome(
    run: Planned, result: Result, labels: Mapping[str, str], share: _Shared, describing: str | None
) -> Outcome:
    trained = _trained(result)
    task = run.factors.get("task", NOT_VARIED)
    known = {**labels, **({trained: task} if task != NOT_VARIED else {})}
    curve = tuple(
        CurvePoint(
            point.step,
            point.epoch,
            point.eval_loss,
            point.best,
            _answers(point.scores, point.predictions, known, share),
        )
        for point in result.curve
    )
    return Outcome(
        run=_name(run),
        factors=run.factors,
        seed=run.seed,
        scores=_answers(result.scores, result.predictions, known, share),
        curve=curve,
        figures=figures_of(result, curve, known.get(trained, trained), describing=describing),
        result=result,
    )


def _answers(
    scores: Mapping[str, Score], predictions: Mapping[str, object], labels: Mapping[str, str], share: _Shared
) -> dict[str, Answers]:
    return {labels.get(name, name): _answer(name, score, predictions, share) for name, score in scores.items()}


def _answer(name: str, score: Score, predictions: Mapping[str, object], share: _Shared) -> Answers:
    ids: tuple[str, ...] = ()
    grades: NDArray[np.float64] = np.empty(0)
    if isinstance(predictions, Predictions) and name in predictions:
        ids, grades = predictions.grades(name)
    return Answers(
        task=name,
        metric=score.metric,
        value=score.headline,
        unit=score.unit,
        ids=share(ids),
        scores=grades * _unit(grades, score.headline),
        values=score.values,
    )


def _unit(grades: NDArray[np.float64], headline: float) -> float:
    """What a grade of 1 is in the headline's unit: 1 or 100 but for rounding, in most metrics."""
    mean = float(grades.mean()) if grades.size else 0.0
    if not mean:
        return 1.0
    unit = headline / mean
    return next((usual for usual in (1.0, 100.0) if abs(unit - usual) <= ALIKE * usual), unit)
