"""Files of answers and of one reference each, for the metrics that compare two texts.

A reference is the entry of a list of JSON or JSON lines; or a LLaVA record, whose last turn it is. Where no file
has ids, the n-th answer belongs to the n-th reference, and their numbers must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_mllm.metrics.base import Case, Given, Prediction, reference
from peft_mllm.metrics.reading import ID_KEYS, Document, Row, answer_of, in_words, one_file, read
from peft_mllm.metrics.splits import asked_ids
from peft_mllm.record import Record

_ANSWERS = ("gt_answers", "gt_answer", "annotation", "answers", "answer", "label", "reference", "solution", "caption")
_QUESTIONS = ("question", "prompt", "text")
CONTAINERS = ("annotations", "data", "questions", "predictions", "results")


def read_pairs(given: Given) -> Case:
    """Read answers and references with ids, or both without."""
    references = [row for path in given.references for row in rows_of(read(path))]
    path = one_file(given.predictions, "--predictions")
    answers = read(path).rows(*CONTAINERS)
    if any(has_id(row) for row in references) and any(has_id(row) for row in answers):
        records = [record_of(row, row.key()) for row in references]
        predictions = [Prediction(row.key(), answer_of(row), row.place) for row in answers]
    else:
        records = [record_of(row, f"#{number}") for number, row in enumerate(references, start=1)]
        predictions = [Prediction(f"#{n}", answer_of(row), row.place) for n, row in enumerate(answers, start=1)]
    if given.questions:
        asked = asked_ids(given.questions)
        records = [record for record in records if record.id in asked]
    return Case(predictions, records)


def rows_of(document: Document) -> list[Row]:
    """The entries of a file of references."""
    return document.rows(*CONTAINERS)


def has_id(row: Row) -> bool:
    """Whether an entry has an id of any name."""
    return any(key in row.value for key in ID_KEYS)


def record_of(row: Row, key: str, **meta: Any) -> Record:
    """The record of a reference; several accepted answers stand in `meta["accepted"]`."""
    accepted = _accepted(row)
    question = next((row.value[name] for name in _QUESTIONS if isinstance(row.value.get(name), str)), "")
    return reference(key, accepted[0], question=question, source=row.place, accepted=accepted, **meta)


def _accepted(row: Row) -> tuple[str, ...]:
    turns = row.value.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        found: Any = turns[-1].get("value")
    else:
        found = row.find(_ANSWERS, "reference")
    answers: Sequence[Any] = found if isinstance(found, list) else [found]
    if not answers:
        row.fail("the list of answers is empty.")
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            row.fail(f"the reference is {answer!r}, {in_words(answer)}, and must be text.")
    return tuple(map(str, answers))
