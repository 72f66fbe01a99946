"""Exact match: an answer is right if it is the reference, apart from case and surrounding space.

    correct = strip(lower(prediction)) == strip(lower(reference))
    accuracy = 100 * mean(correct)

The plainest rule there is, for a user's own data; nothing else is forgiven, not even a full stop.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.metrics.base import Case, Given, Metric, Scores, Variant, per_cent
from peft_mllm.metrics.pairs import read_pairs
from peft_mllm.record import Record


class Exact(Metric):
    """Per cent of answers that equal the reference in lower case without surrounding space."""

    source = "our own, for data without an official scorer"
    variants = {
        "plain": Variant(
            "exact/plain: equals the reference in lower case, without surrounding space (per cent)",
            "lower(strip(prediction)) == lower(strip(reference))",
        ),
        "verbatim": Variant(
            "exact/verbatim: equals the reference, every character (per cent)",
            "prediction == reference",
            "no case and no space is forgiven",
        ),
    }
    files = "lists of JSON or JSON lines with id and answer; LLaVA records; a run's predictions"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; an empty one is not understood, and wrong.

        Raises:
            DataError: there is nothing to score.
        """
        plain = str if self.variant == "verbatim" else lambda text: text.strip().lower()
        given = [plain(prediction) for prediction in predictions]
        right = [
            float(answer in {plain(each) for each in record.meta.get("accepted", [record.answer])})
            for answer, record in zip(given, records, strict=True)
        ]
        return Scores(
            values={"accuracy": per_cent(right)},
            per_question=right,
            parsed=[answer or None for answer in given],
        )

    def read(self, given: Given) -> Case:
        """Read answers and references."""
        return read_pairs(given)
