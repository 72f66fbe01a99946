"""The report: one HTML page that holds everything, needs no network, and can be sent by mail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from peft_mllm.files import atomic_write
from peft_mllm.pages import templates
from peft_mllm.study import wording
from peft_mllm.study.compare import Comparison, Row, compare
from peft_mllm.study.conclude import conclusion
from peft_mllm.study.drawings.looks import NEUTRAL, Look, looks
from peft_mllm.study.figures import draw_all
from peft_mllm.study.render import Column, columns
from peft_mllm.study.results import Prediction, Result, Score

QUESTIONS = 12
"""How many questions the page shows with every run's answer."""


def write_report(results: Sequence[Result], path: Path, *, title: str, task: str, seen: Sequence[str] = ()) -> None:
    """Write the comparison of several runs as one HTML page.

    Args:
        results: the runs, in the order of the table's rows.
        path: the page; replaced as a whole or not at all.
        title: its heading.
        task: the new task, that the runs were trained on.
        seen: tasks that the base model could already do.

    Raises:
        DiskError: the page cannot be written.
    """
    atomic_write(path, render_report(results, title=title, task=task, seen=seen), what="the report")


def render_report(results: Sequence[Result], *, title: str, task: str, seen: Sequence[str] = ()) -> str:
    """The page as text."""
    comparison = compare(results, task=task, seen=seen)
    look = looks([result.method.name for result in results if not result.is_zero_shot])
    return templates("study").get_template("report.html.j2").render(
        title=title,
        conclusion=conclusion(comparison),
        comparison=comparison,
        facts=_facts(results, comparison),
        columns=columns(comparison),
        lines=[Line(row, comparison, look) for row in comparison.rows],
        legend=look,
        figures=draw_all(results, comparison, look),
        runs=[Run(result, _colour(result.method.name, look)) for result in results],
        questions=telling_questions(results, task),
        asked=[result.name for result in results if result.predictions.get(task)],
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One row of the page's table."""

    row: Row
    comparison: Comparison
    look: Mapping[str, Look]

    @property
    def colour(self) -> str:
        """The method's colour in the figures."""
        return _colour(self.row.method, self.look)

    def order(self, column: Column) -> str:
        """What the page sorts by; empty for a cell without a figure, which stays last."""
        value = column.order(self.row)
        return "" if value is None else str(value)

    @property
    def track(self) -> tuple[float, float, float] | None:
        """Where low, value and high of the score lie on a line common to all rows, in per cent."""
        score = self.row.score
        if score is None or score.low is None or score.high is None:
            return None
        limits = [row.score for row in self.comparison.rows if row.score]
        lowest = min(score.value if score.low is None else score.low for score in limits)
        highest = max(score.value if score.high is None else score.high for score in limits)
        width = (highest - lowest) or 1.0
        low, value, high = (100 * (place - lowest) / width for place in (score.low, score.value, score.high))
        return low, value, high


@dataclass(frozen=True)
class Run:
    """One run's drill-down."""

    result: Result
    colour: str

    @cached_property
    def spec(self) -> str:
        """The spec as it would stand in a file."""
        return yaml.safe_dump(_plain(self.result.spec), sort_keys=False, allow_unicode=True) if self.result.spec else ""

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Trained parts, each with its parameters and learning rate."""
        return [(name, _part(part.parameters, part.learning_rate)) for name, part in self.result.trainable.items()]

    @property
    def scores(self) -> list[tuple[str, str]]:
        """Every task's headline with the rule that made it."""
        return [(task, _score(score)) for task, score in self.result.scores.items()]

    @property
    def training(self) -> list[tuple[str, str]]:
        """What the training took."""
        return list(_training(self.result))

    @property
    def retention(self) -> list[tuple[str, str]]:
        """What was kept of each subject."""
        return [(name, _kept(sides)) for name, sides in self.result.retention.items()]

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What it came from."""
        return list(_provenance(self.result))


@dataclass(frozen=True)
class Question:
    """One question with each run's answer, in the order of the runs."""

    id: str
    text: str
    answer: str
    said: Sequence[Prediction]


def telling_questions(results: Sequence[Result], task: str, *, most: int = QUESTIONS) -> list[Question]:
    """The questions that divide the runs most evenly, then those that all answered alike; in file order."""
    asked = [result.predictions[task] for result in results if result.predictions.get(task)]
    if not asked:
        return []
    by_id = [{prediction.id: prediction for prediction in predictions} for predictions in asked]
    common = [prediction for prediction in asked[0] if all(prediction.id in others for others in by_id)]
    questions = [Question(one.id, one.question, one.answer, [others[one.id] for others in by_id]) for one in common]
    chosen = sorted(range(len(questions)), key=lambda i: (_evenness(questions[i]), i))[:most]
    return [questions[i] for i in sorted(chosen)]


def _evenness(question: Question) -> float:
    """0 where half the runs are right, 0.5 where all agree."""
    return abs(sum(said.score for said in question.said) / len(question.said) - 0.5)


def _facts(results: Sequence[Result], comparison: Comparison) -> list[tuple[str, str]]:
    """What the page is about, at a glance."""
    models = dict.fromkeys(f"{result.model.source} ({result.model.family})" for result in results)
    asked = sorted({row.questions for row in comparison.rows if row.score})
    used = sorted({source.used for result in results if (source := result.data.get("train"))})
    seeds = dict.fromkeys(str(result.seed) for result in results if result.seed is not None)
    facts = [
        ("base model", wording.and_list(list(models))),
        ("new task", comparison.task),
        ("seen tasks", wording.and_list(comparison.seen)),
        ("trained on", f"{wording.and_list([str(n) for n in used])} questions" if used else ""),
        ("tested on", f"{wording.and_list([str(n) for n in asked])} questions" if asked else ""),
        ("seed", wording.and_list(list(seeds))),
    ]
    return [(name, value) for name, value in facts if value]


def _training(result: Result) -> Iterator[tuple[str, str]]:
    training = result.training
    if training is None:
        return
    yield "steps", f"{training.steps} ({training.epochs:g} epochs)"
    yield "time", wording.duration(training.seconds)
    yield "tokens", f"{training.tokens:,} ({training.answer_tokens:,} of answers)"
    yield "speed", f"{training.tokens_per_second:,.0f} tokens a second"
    if training.best:
        yield (
            "best",
            ", ".join(f"{name} {value:.4g}" for name, value in training.best.items() if value is not None),
        )
    if result.peak_memory_bytes:
        yield "peak memory", wording.size(result.peak_memory_bytes)


def _provenance(result: Result) -> Iterator[tuple[str, str]]:
    yield "spec", result.spec_id
    yield "model", " ".join(filter(None, [result.model.source, result.model.fingerprint]))
    for split, source in result.data.items():
        kept = f"read {source.read} = used {source.used} + quarantined {source.quarantined}"
        yield f"data, {split}", " ".join(filter(None, [source.task, kept, source.fingerprint]))
    yield "directory", result.directory.name if result.directory else ""
    yield "seed", str(result.seed)
    for name, version in result.environment.items():
        yield name, str(version)


def _score(score: Score) -> str:
    figure = f"{wording.figure(score.headline)}{wording.GLUE}{score.unit}".strip()
    asked = f"{score.split}, {score.n} questions, {score.unparsed} unparsed"
    return f"{figure} ({score.rule or score.metric}; {asked})"


def _kept(sides: Mapping[str, Mapping[str, float]]) -> str:
    before, after = sides["before"], sides["after"]
    loss = f"loss {before['loss']:.3f} before, {after['loss']:.3f} after"
    if "exact" not in before:
        return loss
    unit = f"{wording.GLUE}%"
    exact = f"{wording.figure(before['exact'])}{unit} before, {wording.figure(after['exact'])}{unit} after"
    return f"{loss}; the reference to the token: {exact}"


def _part(parameters: int, learning_rate: float | None) -> str:
    speed = f" at a learning rate of {learning_rate:g}" if learning_rate is not None else ""
    return f"{parameters:,} parameters{speed}"


def _colour(method: str, look: Mapping[str, Look]) -> str:
    return look[method].colour if method in look else NEUTRAL


def _plain(value: Any) -> Any:
    """Only what YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
