"""GQA accuracy: one word or phrase, right if it is the reference.

Hudson and Manning 2019 (arXiv 1902.09506); source: the release's eval.py, LLaVA's convert_gqa_for_eval.py.

    accuracy = 100 * mean(prediction == answer)

over the balanced questions; `binary` are those that verify, choose, compare or combine, `open` those that query.
The official script compares the strings as they are; LLaVA takes a full stop off and lowers the prediction before.
Consistency, validity, plausibility and distribution need further files, and are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, by_group, per_cent, reference
from peft_mllm.metrics.pairs import read_pairs
from peft_mllm.metrics.reading import Document, Row, answer_of, in_words, one_file, read
from peft_mllm.metrics.splits import asked_ids
from peft_mllm.record import Record


class GQAAccuracy(Metric):
    """Per cent of right answers, in all, for binary and open questions, and by structural and semantic type."""

    source = "GQA eval.py; LLaVA convert_gqa_for_eval.py"
    variants = {
        "official": Variant("gqa/official: equals the answer as it stands", "prediction == answer"),
        "llava": Variant(
            "gqa/llava: equals the answer after the full stops at its end are off and it is lower case",
            "lower(rstrip(prediction, '.')) == answer",
            "what LLaVA gives to the official script: forgives 'Yes.' for 'yes'",
        ),
    }
    files = (
        "question files {id: {question, answer, types, isBalanced}}, official predictions "
        "[{questionId, prediction}], LLaVA's answers as JSON lines"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction."""
        given = [each.rstrip(".").lower() if self.variant == "llava" else each for each in predictions]
        right = [float(answer == record.answer) for answer, record in zip(given, records, strict=True)]
        types = [record.meta.get("types") or {} for record in records]
        kinds = [
            ["open" if each["structural"] == "query" else "binary"] if each.get("structural") else [] for each in types
        ]
        values = {"accuracy": per_cent(right), **by_group("accuracy", right, kinds, order=("binary", "open"))}
        for name in ("structural", "semantic"):
            values |= by_group("accuracy", right, [[each.get(name) or ""] for each in types])
        return Scores(values, right, [answer or None for answer in given])

    def read(self, given: Given) -> Case:
        """Read questions with answers, and predictions; of the questions, the balanced ones."""
        documents = [read(path) for path in given.references]
        if not all(_is_release(document) for document in documents):
            return read_pairs(given)
        rows = [
            Row(value, f"{document.path}, question {key}")
            for document in documents
            for key, value in document.mapping("id: question").items()
        ]
        balanced = [row for row in rows if row.value.get("isBalanced", True)]
        predictions = [
            Prediction(row.key(), answer_of(row), row.place)
            for row in read(one_file(given.predictions, "--predictions")).rows("predictions", "results")
        ]
        records = [_record(row) for row in balanced]
        asked = asked_ids(given.questions) if given.questions else {record.id for record in records}
        # the official script scores the balanced questions and ignores answers to others
        others = {row.place.rsplit(" ", 1)[1] for row in rows} - {record.id for record in records}
        return Case(
            [prediction for prediction in predictions if prediction.key not in others],
            [record for record in records if record.id in asked],
        )


def _is_release(document: Document) -> bool:
    values: Any = document.value.values() if isinstance(document.value, dict) else [None]
    return all(isinstance(value, dict) and "question" in value for value in values)


def _record(row: Row) -> Record:
    answer = row.find(["answer"], "answer")
    if not isinstance(answer, str):
        row.fail(f"the answer is {answer!r}, {in_words(answer)}, and must be text.")
    types = {name: str(value) for name, value in row.get("types", dict, {}).items() if value is not None}
    question = row.get("question", str, "")
    return reference(row.place.rsplit(" ", 1)[1], answer, question=question, source=row.place, types=types)
