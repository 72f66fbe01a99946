"""What a study is evidence for: all its lines of one model and task compared with each other, with how they were made.

A report compares the lines of a block, which are equal in all but the method. Who asks what to use chooses among
methods, placements and open parts at once, so here all trained lines of a model and task are one family of
comparisons, corrected by Holm together; and likewise their means over all tasks of the study.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from peft_mllm.errors import DataError
from peft_mllm.files import read_json, write_json
from peft_mllm.methods import METHODS
from peft_mllm.study.analyse import analyse
from peft_mllm.study.analysis import Analysis, Block, Difference, Effect, Line, Overall
from peft_mllm.study.inference.differences import Comparison, differences_by_seed, paired_differences
from peft_mllm.study.inference.intervals import clipped, interval_by_seed, mean_interval
from peft_mllm.study.lines import checked
from peft_mllm.study.outcomes import NOT_VARIED, ZERO_SHOT, Cell, Outcome, cells_of
from peft_mllm.study.pairing import (
    Group,
    bounds_over,
    group_of,
    on_common_questions,
    pairwise_differences,
    plain,
    stacked,
)
from peft_mllm.study.reading import StudyResults
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.view import View

SCHEMA = 1
MODEL, TASK = "model", "task"
SHIPPED = "shipped with the package; its runs are not on this disk"
"""In the place of evidence without runs here."""


@dataclass(frozen=True)
class Setting:
    """How a line was made, from its run's spec; empty where only labels are known.

    Attributes:
        model: as the spec names it, or the label.
        task: name on the tasks shelf, or the label.
        method: name on the methods shelf, or the label.
        options: of the method, where they are not its defaults.
        learning_rate: of the method's parameters.
        device: on which time and memory were measured.
        runs: paths of the run directories, or lines of a table.
    """

    model: str
    task: str
    method: str
    options: Mapping[str, Any]
    location: str
    connector: str
    vision: str
    learning_rate: float | None
    device: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to train, as a choice among others.

    Attributes:
        name: its labels, without model and task.
        lines: places in `Evidence.lines`: one, or one for each of several tasks.
        score: its mean, over tasks each with the same weight.
    """

    name: str
    lines: tuple[int, ...]
    score: Estimate


@dataclass(frozen=True)
class Choice:
    """All candidates of a model, on one task or over several.

    Attributes:
        model: label; empty in a study of one model.
        tasks: labels.
        candidates: highest score first.
        differences: of all pairs that can be compared, corrected by Holm together.
        seeds, questions: that the comparisons rest on, at most; no question where only whole runs' scores are known.
    """

    model: str
    tasks: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    differences: tuple[Difference, ...]
    seeds: int
    questions: int


@dataclass(frozen=True)
class Evidence:
    """A study without its single questions.

    Attributes:
        place: the study's directory or file.
        settings: one for each of `lines`.
        unit: of the scores.
        failed: how many runs were set aside.
    """

    title: str
    place: str
    axes: Mapping[str, tuple[str, ...]]
    seen: tuple[str, ...]
    protocol: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    settings: tuple[Setting, ...]
    choices: tuple[Choice, ...]
    blocks: tuple[Block, ...]
    overall: tuple[Overall, ...]
    effects: tuple[Effect, ...]
    notes: tuple[str, ...]
    unit: str
    failed: int
    missing: int
    schema: int = SCHEMA

    def models(self) -> tuple[str, ...]:
        """What its models are called, by specs and by labels."""
        names = (*(each.model for each in self.settings), *(each.model for each in self.choices))
        return tuple(dict.fromkeys(filter(None, names)))


def evidence_from(study: StudyResults, place: str) -> Evidence:
    """A study's evidence.

    Args:
        study: as it was read.
        place: where, for who reads the advice.
    """
    analysis = analyse(study)
    cells = {_key(cell.factors): cell for cell in cells_of(analysis.outcomes)}
    own = [cells[_key(line.factors)] for line in analysis.lines]
    view = View(analysis)
    return Evidence(
        title=analysis.title,
        place=place,
        axes=analysis.axes,
        seen=analysis.seen,
        protocol=analysis.protocol,
        lines=analysis.lines,
        settings=tuple(_setting(cell) for cell in own),
        choices=tuple(_choices(analysis, own, view)),
        blocks=analysis.blocks,
        overall=analysis.overall,
        effects=analysis.effects,
        notes=analysis.notes,
        unit=view.unit,
        failed=len(analysis.failed),
        missing=analysis.missing,
    )


def write_evidence(file: Path, evidence: Evidence) -> None:
    """Write it as JSON.

    Raises:
        DiskError: it cannot be written.
    """
    write_json(file, asdict(evidence), what="the evidence")


def read_evidence(file: Path) -> Evidence:
    """Read what `write_evidence` wrote.

    Raises:
        DataError: it cannot be read, or does not fit; with the field.
    """
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}. `scripts/update_evidence.py` writes it again.") from error
    return checked(Evidence, content, file)


def _key(factors: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(factors.items()))


# --- how a line was made ---


def _setting(cell: Cell) -> Setting:
    outcome, labels = cell.outcomes[0], cell.factors
    runs = tuple(map(_cited, cell.outcomes))
    result = outcome.result
    if result is None:
        said = {axis: "" if label == NOT_VARIED else label for axis, label in labels.items()}
        return Setting(
            model=said.get(MODEL, ""),
            task=said.get(TASK, ""),
            method=said.get("method", ""),
            options={},
            location=said.get("location", ""),
            connector=said.get("connector", ""),
            vision=said.get("vision", ""),
            learning_rate=None,
            device="",
            runs=runs,
        )
    own = [part.learning_rate for name, part in result.trainable.items() if name == "llm"]
    task = result.spec.get("task")
    return Setting(
        model=result.model.source,
        task=str(task.get("name")) if isinstance(task, Mapping) else str(task or outcome.task),
        method=result.method.name,
        options=_options(result.method.name, result.spec),
        location=result.method.location or "",
        connector=str(result.spec.get("connector", "")),
        vision=str(result.spec.get("vision", "")),
        learning_rate=own[0] if own else None,
        device=str(result.environment.get("device", "")),
        runs=runs,
    )


def _options(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options that are not its defaults."""
    method = spec.get("method")
    said = method.get("options", {}) if isinstance(method, Mapping) else {}
    fields = METHODS[name].Options.model_fields if name in METHODS else {}
    usual = {key: list(field.default) if field.default == () else field.default for key, field in fields.items()}
    return {key: value for key, value in said.items() if key not in usual or usual[key] != value}


def _cited(outcome: Outcome) -> str:
    directory = outcome.result.directory if outcome.result else None
    return directory.as_posix() if directory else outcome.run


# --- choices ---


def _choices(analysis: Analysis, cells: Sequence[Cell], view: View) -> Iterator[Choice]:
    models: dict[str, dict[str, dict[str, int]]] = {}
    for place, line in enumerate(analysis.lines):
        if line.factors.get("method") != ZERO_SHOT and line.score is not None:
            tasks = models.setdefault(line.factors.get(MODEL, ""), {})
            name = view.title(line.factors, without=(MODEL, TASK)) or line.factors.get(analysis.contrast, "")
            tasks.setdefault(line.factors.get(TASK, ""), {})[name] = place
    for model, tasks in models.items():
        groups = {
            task: {name: own for name, place in named.items() if (own := group_of(cells[place], task))}
            for task, named in tasks.items()
        }
        for task, named in tasks.items():
            yield _on_one(model, task, named, groups[task], analysis.lines)
        together = _over_all(model, tasks, groups) if len(tasks) > 1 else None
        if together is not None:
            yield together


def _on_one(
    model: str, task: str, places: Mapping[str, int], groups: Mapping[str, Group], lines: Sequence[Line]
) -> Choice:
    found = [Candidate(name, (place,), score) for name, place in places.items() if (score := lines[place].score)]
    comparisons, _ = pairwise_differences(groups)
    return _choice(model, (task,), found, comparisons)


def _over_all(
    model: str, tasks: Mapping[str, Mapping[str, int]], groups: Mapping[str, Mapping[str, Group]]
) -> Choice | None:
    """The candidates that every task has, on the seeds that all of them have; None without either."""
    names = [name for name in next(iter(groups.values())) if all(name in each for each in groups.values())]
    every = [each[name] for each in groups.values() for name in names]
    seeds = [seed for seed in every[0].seeds if all(seed in group.seeds for group in every)] if every else []
    if not seeds:
        return None
    known = all(group.known for group in every)
    common = [on_common_questions(each) if known else each for each in groups.values()]
    if any(name not in each for each in common for name in names):
        return None
    scores, bounds, comparisons = {}, {}, list[Comparison]()
    for name in names:
        own = [_on_seeds(each[name], seeds) for each in common]
        bounds[name] = bounds_over(own)
        scores[name] = stacked([group.scores * group.points for group in own]) if known else _mean_of_runs(own)
    if len(names) > 1:
        comparisons = paired_differences(scores) if known else differences_by_seed(scores)
    interval = mean_interval if known else interval_by_seed
    found = [
        Candidate(name, tuple(each[name] for each in tasks.values()), plain(clipped(interval(of), bounds[name])))
        for name, of in scores.items()
    ]
    return _choice(model, tuple(tasks), found, comparisons)


def _on_seeds(group: Group, seeds: Sequence[int | None]) -> Group:
    rows = [group.seeds.index(seed) for seed in seeds]
    return replace(group, seeds=tuple(seeds), scores=group.scores[rows], values=group.values[rows])


def _mean_of_runs(tasks: Sequence[Group]) -> Any:
    """(S,), over tasks."""
    return np.mean([group.values * group.points for group in tasks], axis=0)


def _choice(
    model: str, tasks: tuple[str, ...], candidates: Sequence[Candidate], comparisons: Sequence[Comparison]
) -> Choice:
    told = [(each.first, each.second, each.difference, each.adjusted) for each in comparisons]
    return Choice(
        model=model,
        tasks=tasks,
        candidates=tuple(sorted(candidates, key=lambda each: (-each.score.value, each.name))),
        differences=tuple(Difference(a, b, d.value, d.low, d.high, d.p, adjusted) for a, b, d, adjusted in told),
        seeds=max(chain((d.seeds for _, _, d, _ in told), [0])),
        questions=max(chain((d.questions for _, _, d, _ in told), [0])),
    )
