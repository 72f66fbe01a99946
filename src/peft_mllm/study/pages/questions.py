"""The questions that divide the methods, with the image and each method's answer per seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from peft_mllm.pictures import pictures
from peft_mllm.spec import NamedSpec
from peft_mllm.study.analysis import Block, Line
from peft_mllm.study.drawings.looks import Look
from peft_mllm.study.outcomes import Answers, Outcome, aligned
from peft_mllm.study.results import Prediction
from peft_mllm.study.view import View

SHOWN = 12
"""Questions of each task."""
TASKS = 12
SEEDS = 5
"""Of each method; more of them say no more about a question."""
SIDE = 160
"""Pixels of an image's longer side."""
BUDGET = 3_000_000
"""Bytes of all images in the page."""


@dataclass(frozen=True)
class Said:
    """One answer, with the seeds that gave it."""

    text: str
    score: float
    seeds: str


@dataclass(frozen=True)
class Voice:
    """What one line said."""

    name: str
    look: Look
    answers: Sequence[Said]


@dataclass(frozen=True)
class Question:
    """One question."""

    id: str
    text: str
    answer: str
    voices: Sequence[Voice]
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """A task's telling questions, within one block; `note` says why images are not shown."""

    task: str
    block: str
    asked: int
    questions: Sequence[Question]
    note: str


def telling(view: View) -> list[Asked]:
    """For each trained task those that the lines of its first block answer most differently."""
    found, left = [], BUDGET
    for task, block in _first_blocks(view):
        lines = [line for line in view.members(block) if _known(view, line, task)]
        if sum(view.trained(line) for line in lines) < 2:
            continue
        asked = _asked(view, task, block, lines, left)
        left -= sum(len(image) for question in asked.questions for image in question.images)
        found.append(asked)
        if len(found) == TASKS:
            break
    return found


def _first_blocks(view: View) -> Iterator[tuple[str, Block]]:
    seen = set()
    for block in view.analysis.blocks:
        lines = view.members(block)
        task = block.factors.get("task") or (lines[0].factors.get("task", "") if lines else "")
        if task not in seen:
            seen.add(task)
            yield task, block


def _known(view: View, line: Line, task: str) -> list[tuple[Outcome, Answers]]:
    """Its runs whose single answers on the task are on disk."""
    pairs = [(outcome, outcome.scores.get(task)) for outcome in view.outcomes(line)[:SEEDS]]
    return [(outcome, answers) for outcome, answers in pairs if answers and answers.ids and outcome.result]


def _asked(view: View, task: str, block: Block, lines: Sequence[Line], left: int) -> Asked:
    runs = {place: _known(view, line, task) for place, line in enumerate(lines)}
    ids, means = _means(runs)
    trained = [place for place, line in enumerate(lines) if view.trained(line)]
    divided = np.round(means[trained].std(axis=0), 9)
    chosen = sorted(range(len(ids)), key=lambda i: (-divided[i], i))[:SHOWN]
    chosen = [i for i in chosen if divided[i] > 0]
    told = {place: [_predictions(*pair) for pair in pairs] for place, pairs in runs.items()}
    names = [view.name(line, block.factors) for line in lines]
    looks = [view.look(line.factors) for line in lines]
    questions, expected = [], {}
    for i in sorted(chosen):
        voices = [
            Voice(names[place], looks[place], list(_merged(ids[i], runs[place], told[place])))
            for place in range(len(lines))
        ]
        one = told[trained[0]][0][ids[i]]
        questions.append(Question(ids[i], one.question, one.answer, voices))
        expected[ids[i]] = one.images
    shown, note = _with_images(questions, expected, runs[trained[0]][0], left)
    return Asked(task, view.block_title(block), len(ids), shown, note)


def _means(runs: Mapping[int, Sequence[tuple[Outcome, Answers]]]) -> tuple[list[str], Any]:
    """The questions that all runs answered, and each line's mean over seeds, (lines, questions)."""
    every = [answers for pairs in runs.values() for _, answers in pairs]
    common = set(every[0].ids).intersection(*(answers.ids for answers in every[1:]))
    ids = [name for name in every[0].ids if name in common]
    table = aligned(every)
    ends = np.cumsum([len(pairs) for pairs in runs.values()])
    return ids, np.stack([part.mean(axis=0) for part in np.split(table, ends[:-1])])


def _predictions(outcome: Outcome, answers: Answers) -> dict[str, Prediction]:
    found = outcome.result.predictions.get(answers.task, ()) if outcome.result else ()
    return {each.id: each for each in found}


def _merged(
    id: str, runs: Sequence[tuple[Outcome, Answers]], told: Sequence[Mapping[str, Prediction]]
) -> Iterator[Said]:
    """Equal answers once, with their seeds; seeds are not named where all agree."""
    seeds: dict[tuple[str, float], list[str]] = {}
    for (outcome, _), by_id in zip(runs, told, strict=True):
        said = by_id[id]
        seeds.setdefault((said.prediction, said.score), []).append(str(outcome.seed))
    for (text, score), some in seeds.items():
        yield Said(text, score, f"seed {', '.join(some)}" if len(seeds) > 1 else "")


def _with_images(
    questions: Sequence[Question], expected: Mapping[str, Sequence[str]], pair: tuple[Outcome, Answers], left: int
) -> tuple[list[Question], str]:
    if not questions:
        return [], ""
    if left <= 0:
        return list(questions), "The images are not shown: those of other tasks fill what the page may hold."
    outcome, answers = pair
    images, note = pictures(_named(outcome, answers.task), expected, side=SIDE)
    absent = len(questions) - len(images)
    if not note and absent:
        note = f"{absent} of {len(questions)} images are not shown: the task has no such question now."
    return [replace(each, images=images.get(each.id, ())) for each in questions], note


def _named(outcome: Outcome, task: str) -> NamedSpec | None:
    """How the task was set up, from the run's spec."""
    spec = outcome.result.spec if outcome.result else {}
    for entry in (spec.get("task"), *(spec.get("evaluate") or ())):
        if isinstance(entry, Mapping) and entry.get("name") == task:
            try:
                return NamedSpec.model_validate(dict(entry))
            except ValidationError:
                return None
    return None
