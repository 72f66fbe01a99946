"""Exact match: an answer is right if it is the reference, apart from case and surrounding space.

    correct = strip(lower(prediction)) == strip(lower(reference))
    accuracy = 100 * mean(correct)

The plainest rule there is, for a user's own data; nothing else is forgiven, not even a full stop.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Metric, Scores
from peft_mllm.record import Record


class Exact(Metric):
    """Per cent of answers that equal the reference in lower case without surrounding space."""

    rule = "exact match in lower case, without surrounding space (per cent)"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; an empty one is not understood, and wrong.

        Raises:
            DataError: there is nothing to score.
        """
        if not records:
            raise DataError("There are no records to score. Give a split that has some.")
        given = [prediction.strip().lower() for prediction in predictions]
        right = [float(answer == record.answer.strip().lower()) for answer, record in zip(given, records, strict=True)]
        return Scores(
            values={"accuracy": 100 * sum(right) / len(right)},
            per_question=right,
            parsed=[answer or None for answer in given],
        )
