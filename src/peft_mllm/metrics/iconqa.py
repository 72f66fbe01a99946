"""IconQA accuracy of a model that writes its answer.

Source: IconQA's eval.py and tools/sub_acc.py. They compare an index (`choose_txt`) or two strings as they
are (`fill_in_blank`); a model that writes text needs an agreed reading. Ours is strict: after strip and lower
the prediction equals the right choice's text or the answer. No letters, no numbers for words, no search in
a sentence. `accuracy/verbatim` is the official comparison without strip and lower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from peft_mllm.metrics.base import Metric, Scores
from peft_mllm.record import Record


class IconQAAccuracy(Metric):
    """Per cent of questions answered with the right string, in all, by grade and, where known, by skill."""

    rule = "iconqa/strict: equals the choice's text or the answer after strip and lower; else wrong"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; one that equals none of the choices is unparsed."""
        pairs = list(zip(predictions, records, strict=True))
        right = [float(_plain(prediction) == _plain(record.answer)) for prediction, record in pairs]
        verbatim = [float(prediction == record.answer) for prediction, record in pairs]
        figures = {"accuracy": _per_cent(right), "accuracy/verbatim": _per_cent(verbatim)}
        parsed = [_read(prediction, record) for prediction, record in pairs]
        return Scores(figures | _by_group(right, records), right, parsed)


def _read(prediction: str, record: Record) -> str | None:
    """What was understood: a choice's text as it was given, or any string where nothing is to choose."""
    plain = _plain(prediction)
    if "choices" not in record.meta:
        return plain or None
    return next((choice for choice in record.meta["choices"] if _plain(choice) == plain), None)


def _by_group(right: Sequence[float], records: Sequence[Record]) -> dict[str, float]:
    """Figures by grade and by skill; a question with several skills counts in each, as in sub_acc.py."""
    groups: dict[str, list[float]] = defaultdict(list)
    for score, record in zip(right, records, strict=True):
        grade, skills = record.meta.get("grade"), record.meta.get("skills", ())
        for group in ([grade] if grade else []) + list(skills):
            groups[f"accuracy/{group}"].append(score)
    return {name: _per_cent(scores) for name, scores in sorted(groups.items())}


def _plain(text: str) -> str:
    return text.strip().lower()


def _per_cent(right: Sequence[float]) -> float:
    return 100 * sum(right) / len(right) if right else 0.0
