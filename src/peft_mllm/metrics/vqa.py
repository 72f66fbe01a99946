"""VQA accuracy: agreement with ten people who answered the same question.

Antol et al. 2015 (arXiv 1505.00468), Goyal et al. 2017; source: GT-Vision-Lab/VQA `vqaEval.py`. With the ten
answers g_1..g_10 and the prediction p, both perhaps normalised (`text/vqa_words.py`):

    accuracy(p) = mean over i of min(1, #{j != i : g_j = p} / 3)        0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4+ matches
    accuracy    = 100 * mean over questions

The paper's short form, min(1, matches / 3), is something else (1 instead of 0.9 for three matches). The scorers
that people use differ in which side they normalise, and when; each is a variant. The official code takes an
answer out by comparing whole entries, and so takes equal answers out all at once where they have no ids (VizWiz
in VQA format); we take it out by its place, which is the same wherever the ids are there.

OK-VQA's annotations have stemmed answers ("race" for "racing"); they are scored as they are, as officially.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, by_group, per_cent, reference
from peft_mllm.metrics.reading import Document, Row, answer_of, in_words, one_file, read
from peft_mllm.metrics.text.vqa_words import evalai, official, plain, punctuation, vizwiz
from peft_mllm.record import Record

_ANSWER_TYPES = ("yes/no", "number", "other", "unanswerable")
_CONTAINERS = ("annotations", "data", "questions")
_IDS = ("question_id", "questionId", "id", "image")
_NEEDED = 3

_LEAVE_ONE_OUT = "mean over the n answers of min(1, matches among the other n-1 / 3)"
_ALL = "min(1, matches among all answers / 3)"

Pair = tuple[str, list[str]]


class Rule(NamedTuple):
    """What a variant does: normalise prediction and answers, then count."""

    normalise: Callable[[str, Sequence[str]], Pair]
    leave_one_out: bool


def _head(prediction: str, answers: Sequence[str]) -> Pair:
    given, answers = plain(prediction), [plain(answer) for answer in answers]
    if len(set(answers)) <= 1:
        return given, answers
    return official(given), [official(answer) for answer in answers]


def _of_2015(prediction: str, answers: Sequence[str]) -> Pair:
    disagree = len(set(answers)) > 1
    return official(prediction), [punctuation(answer) if disagree else answer for answer in answers]


def _both(normalise: Callable[[str], str]) -> Callable[[str, Sequence[str]], Pair]:
    return lambda prediction, answers: (normalise(prediction), [normalise(answer) for answer in answers])


RULES: Mapping[str, Rule] = {
    "official": Rule(_head, leave_one_out=True),
    "official-2015": Rule(_of_2015, leave_one_out=True),
    "m4c": Rule(_both(evalai), leave_one_out=True),
    "vizwiz": Rule(lambda prediction, answers: (vizwiz(prediction), list(answers)), leave_one_out=False),
    "n3": Rule(_both(official), leave_one_out=False),
}


class VQAAccuracy(Metric):
    """Per cent of agreement, in all, by type of answer and by type of question."""

    source = "GT-Vision-Lab/VQA vqaEval.py; mmf m4c_evaluators.py; the VizWiz API"
    variants = {
        "official": Variant(
            "vqa/official: normalised only where the ten answers are not all equal; nine of ten",
            f"both sides normalised if the answers differ, else none, not even lower case; {_LEAVE_ONE_OUT}",
        ),
        "official-2015": Variant(
            "vqa/official-2015: prediction normalised, answers' punctuation where they differ; nine of ten",
            f"prediction always normalised, answers only in punctuation and if they differ; {_LEAVE_ONE_OUT}",
            "the state before 2021, still copied by LAVIS, Qwen-VL and InternVL: 'Yes' is right for ten times 'yes'",
        ),
        "m4c": Variant(
            "vqa/m4c: both sides by the EvalAI processor, always; nine of ten",
            f"lower case, no comma or question mark, `'s` apart, then normalised, both sides; {_LEAVE_ONE_OUT}",
            "TextVQA as LLaVA, mmf and EvalAI score it; higher where answers are capitalised",
        ),
        "vizwiz": Variant(
            "vqa/vizwiz: prediction normalised, answers as they are; all ten count",
            f"prediction normalised with the VizWiz table, answers not; {_ALL}",
            "the VizWiz API; about 1 point higher than nine of ten, and 'unanswerable' is an answer like any other",
        ),
        "n3": Variant(
            "vqa/n3: both sides normalised, always; all ten count",
            f"both sides normalised; {_ALL}",
            "the paper's short form (Molmo, and others); higher than nine of ten, as three matches are enough",
        ),
    }
    files = (
        "VQA question, annotation and result files; TextVQA's and VizWiz's JSON; LLaVA's answers as JSON lines, "
        "for TextVQA joined by image and question as LLaVA does"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction against its record's `meta["answers"]`."""
        rule = RULES[self.variant]
        right, parsed = [], []
        for prediction, record in zip(predictions, records, strict=True):
            given, answers = rule.normalise(prediction, _answers(record))
            right.append(agreement(given, answers, leave_one_out=rule.leave_one_out))
            parsed.append(given)
        kinds = [[str(record.meta.get("answer_type") or "")] for record in records]
        questions = [[str(record.meta.get("question_type") or "")] for record in records]
        known = {name for [name] in kinds if name}
        values = {
            "accuracy": per_cent(right),
            **by_group("accuracy", right, kinds, order=_ANSWER_TYPES),
            # OK-VQA has "other" among the types of answers and among those of questions
            **by_group("accuracy", right, [[f"{name} (question)" if name in known else name] for [name] in questions]),
        }
        return Scores(values, right, parsed)

    def read(self, given: Given) -> Case:
        """Read annotations and results; question files only restrict and check the ids."""
        records = [record for path in given.references for record in _references(read(path))]
        unknown: set[str] = set()
        if given.questions:
            records, unknown = _asked(records, [read(path) for path in given.questions], partial=given.partial)
        rows = read(one_file(given.predictions, "--predictions")).rows("predictions", "results", "annotations")
        predictions, records = _joined(rows, records)
        # those that have an answer are counted by it
        dropped = unknown - {prediction.key for prediction in predictions}
        return Case(predictions, records, dropped=len(dropped))


def agreement(prediction: str, answers: Sequence[str], *, leave_one_out: bool) -> float:
    """The accuracy of one normalised prediction, 0 to 1, against normalised answers."""
    matches = sum(answer == prediction for answer in answers)
    if not leave_one_out:
        return min(1.0, matches / _NEEDED)
    without = [min(1.0, (matches - (answer == prediction)) / _NEEDED) for answer in answers]
    return sum(without) / len(without)


def _answers(record: Record) -> list[str]:
    answers = record.meta.get("answers")
    if not answers:
        raise DataError(
            f"{record.source or record.id}: has no list of answers, which VQA accuracy compares with. "
            "Use the metric 'exact' where there is one answer."
        )
    return list(answers)


def _references(document: Document) -> list[Record]:
    return [_reference(row) for row in document.rows(*_CONTAINERS)]


def _reference(row: Row) -> Record:
    answers = [_one_answer(row, answer) for answer in row.get("answers", list, [])]
    if not answers:
        row.fail("has no answers. The answers of a test split are not public; give the annotations of another.")
    return reference(
        row.key(_IDS),
        answers[0],
        question=row.get("question", str, ""),
        source=row.place,
        answers=tuple(answers),
        answer_type=row.get("answer_type", str, ""),
        question_type=row.get("question_type", str, ""),
        image_id=str(row.value.get("image_id", "")),
    )


def _one_answer(row: Row, answer: object) -> str:
    text = answer.get("answer") if isinstance(answer, dict) else answer
    if not isinstance(text, str):
        row.fail(f"one of its answers is {answer!r}, {in_words(answer)}, and must be text or an object with 'answer'.")
    return text


def _asked(records: Sequence[Record], documents: Sequence[Document], *, partial: bool) -> tuple[list[Record], set[str]]:
    """The references of the questions that were asked, and the ids without one: only `partial` allows these."""
    asked = {row.key(_IDS) for document in documents for row in document.rows("questions", "data")}
    known = {record.id for record in records} | {str(record.meta["image_id"]) for record in records}
    unknown = asked - known
    if unknown and not partial:
        raise DataError(
            f"{documents[0].path}: {len(unknown)} of its {len(asked)} questions have no reference: "
            f"{', '.join(sorted(unknown)[:10])}. Give the references of these questions, or --partial."
        )
    ids = {record.id for record in records}
    images = asked - ids  # what is no question's id is an image's: LLaVA's TextVQA
    return [record for record in records if record.id in asked or record.meta["image_id"] in images], unknown


def _joined(rows: Sequence[Row], records: Sequence[Record]) -> tuple[list[Prediction], list[Record]]:
    """Predictions by id, and what they are scored against.

    LLaVA's answers to TextVQA name the image instead of the question, which the prompt has. Where an image has the
    same question twice, its script scores both answers against the last of their annotations.
    """
    known = {record.id: record for record in records}
    rescored: dict[str, Record] = {}
    by_question: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        by_question[record.meta["image_id"], record.question[0].text.lower()].append(record.id)
    predictions = []
    for row in rows:
        key = row.key(_IDS)
        if key not in known and isinstance(row.value.get("prompt"), str):
            same = by_question.get((key, question_of(row.value["prompt"]).lower()), [])
            if same:
                last = known[same[-1]]
                key = same.pop(0) if len(same) > 1 else same[0]
                rescored[key] = replace(last, id=key)
        predictions.append(Prediction(key, answer_of(row), row.place))
    return predictions, [rescored.get(record.id, record) for record in records]


def question_of(prompt: str) -> str:
    """The question in a prompt of LLaVA for TextVQA: a line of its own, before or after the OCR tokens."""
    found = (
        re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL) if prompt.startswith("OCR tokens: ") else None
    )
    if found:
        return found[1]
    lines = prompt.split("\n")
    return lines[1] if prompt.startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
