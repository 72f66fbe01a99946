"""OCR-VQA accuracy: the text on a book's cover, or a fact about it.

Mishra et al. 2019. There is no official scorer. Qwen-VL, VLMEvalKit and big_vision compare whole texts:

    correct = lower(strip(prediction)) == lower(strip(answer))

OCRBench looks for the answer in the prediction instead, both normalised as for VQA (`text/vqa_words.py`), between
word boundaries. That is kinder to models that answer in sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, per_cent, reference
from peft_mllm.metrics.pairs import CONTAINERS, read_pairs
from peft_mllm.metrics.reading import ID_KEYS, Document, Row, answer_of, in_words, one_file, read
from peft_mllm.metrics.splits import asked_ids, smallest_split
from peft_mllm.metrics.text.vqa_words import official
from peft_mllm.record import Record

_SPLITS = {1: "train", 2: "validation", 3: "test"}


class OCRVQAAccuracy(Metric):
    """Per cent of questions whose answer the prediction is, or holds."""

    source = "no official scorer; Qwen-VL eval_mm (exact), OCRBench (substring)"
    variants = {
        "exact": Variant(
            "ocrvqa/exact: equals the answer after strip and lower",
            "lower(strip(prediction)) == lower(strip(answer))",
        ),
        "substring": Variant(
            "ocrvqa/substring: the normalised answer stands in the normalised prediction, as whole words",
            "search(\\b normalised(answer) \\b, normalised(prediction))",
            "OCRBench's rule; higher, above all for models that answer in sentences",
        ),
    }
    files = (
        "dataset.json {asin: {questions, answers, split}}, whose ids are asin_0, asin_1, ...; or lists of JSON or "
        "JSON lines with id and answer"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; an empty one is not understood, and wrong."""
        right_one = _holds if self.variant == "substring" else _equals
        right = [
            float(any(right_one(prediction, answer) for answer in record.meta.get("accepted", [record.answer])))
            for prediction, record in zip(predictions, records, strict=True)
        ]
        return Scores({"accuracy": per_cent(right)}, right, [each.strip() or None for each in predictions])

    def read(self, given: Given) -> Case:
        """Read references and answers; of the official release, the split that the answers are of."""
        documents = [read(path) for path in given.references]
        if not all(_is_release(document) for document in documents):
            return read_pairs(given)
        records = [record for document in documents for record in _books(document)]
        predictions = [_prediction(row) for row in read(one_file(given.predictions, "--predictions")).rows(*CONTAINERS)]
        splits: dict[str, list[str]] = {}
        for record in records:
            splits.setdefault(record.meta["split"], []).append(record.id)
        keys = {prediction.key for prediction in predictions}
        ids = asked_ids(given.questions) if given.questions else smallest_split(keys, splits)
        return Case(predictions, [record for record in records if record.id in ids])


def _equals(prediction: str, answer: str) -> bool:
    return prediction.strip().lower() == answer.strip().lower()


def _holds(prediction: str, answer: str) -> bool:
    return re.search(rf"\b{re.escape(official(answer))}\b", official(prediction)) is not None


def _is_release(document: Document) -> bool:
    """Whether a file is dataset.json: books by asin, each with lists of questions and answers."""
    books = document.value.values() if isinstance(document.value, dict) else [None]
    return all(isinstance(book, dict) and isinstance(book.get("questions"), list) for book in books)


def _books(document: Document) -> list[Record]:
    records = []
    for asin, book in document.mapping("asin: book").items():
        row = Row(book, f"{document.path}, book {asin}")
        questions, answers = row.get("questions", list, []), row.get("answers", list, [])
        if len(questions) != len(answers):
            row.fail(f"has {len(questions)} questions and {len(answers)} answers.")
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if not isinstance(question, str) or not isinstance(answer, str):
                row.fail(f"question {number + 1} or its answer is {in_words(answer)}, and must be text.")
            split = _SPLITS.get(row.get("split", int, 0), "all")
            records.append(reference(f"{asin}_{number}", answer, question=question, source=row.place, split=split))
    return records


def _prediction(row: Row) -> Prediction:
    """An answer names its question by `asin_0`, or by the book and the question's number."""
    key = row.key((*ID_KEYS, "asin"))
    if "asin" in row.value and isinstance(row.value.get("index"), int):
        key = f"{row.value['asin']}_{row.value['index']}"
    elif "image" in row.value and isinstance(row.value.get("index"), int):
        key = f"{Path(str(row.value['image'])).stem}_{row.value['index']}"
    return Prediction(key, answer_of(row), row.place)
