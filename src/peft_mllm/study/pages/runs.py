"""Every run for the page's list: what it was, what it scored and cost, and its spec; texts are kept once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft_mllm.study import wording
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.outcomes import Answers, Outcome
from peft_mllm.study.pages.embed import Strings
from peft_mllm.study.pages.yaml_lines import yaml_lines
from peft_mllm.study.results import Result
from peft_mllm.study.view import View
from peft_mllm.study.view import words as axis_words

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Listed:
    """A run's line in the list: what is seen before it is opened."""

    name: str
    title: str
    seed: str
    score: str
    colour: str


def listed(view: View) -> list[Listed]:
    """The runs in the study's order."""
    return [
        Listed(
            outcome.run,
            view.title(outcome.factors),
            "" if outcome.seed is None else str(outcome.seed),
            _headline(outcome.scores.get(outcome.task)),
            view.look(outcome.factors).colour,
        )
        for outcome in view.analysis.outcomes
    ]


def details(view: View) -> dict[str, Any]:
    """For the script: `texts`, and of each run its sections of pairs, notes and spec as numbers of texts."""
    texts = Strings()
    runs = [_numbered(outcome, texts) for outcome in view.analysis.outcomes]
    return {"texts": texts.all(), "runs": runs}


def _numbered(outcome: Outcome, texts: Strings) -> list[Any]:
    sections = [
        [texts(heading), [texts(text) for pair in pairs for text in pair]]
        for heading, pairs in _sections(outcome)
        if pairs
    ]
    notes = [texts(note) for note in outcome.result.notes] if outcome.result else []
    spec = [texts(line) for line in yaml_lines(outcome.result.spec)] if outcome.result else []
    return [sections, notes, spec]


def _sections(outcome: Outcome) -> Iterator[tuple[str, Pairs]]:
    yield "Factors", [(axis_words(axis), label) for axis, label in outcome.factors.items()]
    yield "Scores", [(task, _score(answers)) for task, answers in outcome.scores.items()]
    yield "Along the curve", [(f"step {point.step}", _point(point.eval_loss, point.scores)) for point in outcome.curve]
    yield (
        "Costs",
        [
            (measure.words, measure.text(outcome.figures[name]))
            for name, measure in MEASURES.items()
            if name in outcome.figures
        ],
    )
    if outcome.result:
        yield "Training", list(_training(outcome.result))
        yield "Retention", [(name, _kept(sides)) for name, sides in outcome.result.retention.items()]
        yield "Provenance", list(_provenance(outcome.result))


def _headline(answers: Answers | None) -> str:
    return f"{wording.figure(answers.value)}{wording.GLUE}{answers.unit}".strip() if answers else ""


def _score(answers: Answers) -> str:
    others = [f"{name} {value:.4g}" for name, value in answers.values.items()]
    asked = f"{len(answers.ids)} questions" if answers.ids else ""
    inside = ", ".join(filter(None, [answers.metric, asked, *(others[1:] if len(others) > 1 else ())]))
    return f"{_headline(answers)} ({inside})"


def _point(loss: float | None, scores: Mapping[str, Answers]) -> str:
    said = [f"{task} {wording.figure(answers.value)}" for task, answers in scores.items()]
    return ", ".join([*([f"validation loss {loss:.4g}"] if loss is not None else []), *said])


def _training(result: Result) -> Iterator[tuple[str, str]]:
    for name, part in result.trainable.items():
        speed = f" at a learning rate of {part.learning_rate:g}" if part.learning_rate is not None else ""
        yield f"trained: {name}", f"{part.parameters:,} parameters{speed}"
    training = result.training
    if training and training.steps:
        yield "steps", f"{training.steps:,} ({training.epochs:g} epochs)"
        yield "tokens", f"{training.tokens:,} ({training.answer_tokens:,} of answers)"
        best = training.best or {}
        said = [f"{name} {value:.4g}" for name, value in best.items() if type(value) in (int, float)]
        yield from [("best", ", ".join(said))] if said else []


def _kept(sides: Mapping[str, Mapping[str, float]]) -> str:
    """Of one subject, before the training and after."""
    before, after = sides["before"], sides["after"]
    loss = f"loss {before['loss']:.3f} before, {after['loss']:.3f} after"
    if "exact" not in before:
        return loss
    exact = [f"{wording.figure(side['exact'])}{wording.GLUE}%" for side in (before, after)]
    return f"{loss}; the reference to the token: {exact[0]} before, {exact[1]} after"


def _provenance(result: Result) -> Iterator[tuple[str, str]]:
    yield "spec", result.spec_id
    yield "model", " ".join(filter(None, [result.model.source, result.model.fingerprint[:16]]))
    for split, source in result.data.items():
        kept = f"{source.used:,} of {source.read:,} used"
        yield f"data, {split}", " ".join(filter(None, [source.task, kept, source.fingerprint[:16]]))
    yield from ((name, str(value)) for name, value in result.environment.items())
