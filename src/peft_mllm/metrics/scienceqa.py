"""ScienceQA accuracy with LLaVA's reading of an answer.

Source: LLaVA's eval_science_qa.py for reading, ScienceQA's tools/evaluate_acc.py for the subsets.
A prediction, stripped, is read in this order:

    1. it is a letter A to E;
    2. it begins with a letter A to E and ". ";
    3. "The answer is X" and one more character occurs in it exactly once.

The letter must be one of the question's choices. Everything else is unparsed and wrong; the ScienceQA
authors' own script guesses at random there, which lifts GPT-3 from 72.2 to 75.2 and is not repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from peft_mllm.metrics.base import Metric, Scores
from peft_mllm.record import Record

_LETTERS = "ABCDE"
# The last dot is any character: meant as a full stop, but published figures were made with it as it is.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")

Meta = Mapping[str, Any]
_EARLY_GRADES = tuple(f"grade{n}" for n in range(1, 7))

SUBSETS: dict[str, Callable[[Meta], bool]] = {
    "NAT": lambda meta: meta.get("subject") == "natural science",
    "SOC": lambda meta: meta.get("subject") == "social science",
    "LAN": lambda meta: meta.get("subject") == "language science",
    "TXT": lambda meta: bool(meta.get("hint")),
    "IMG": lambda meta: bool(meta.get("has_image")),
    "NO": lambda meta: not meta.get("hint") and not meta.get("has_image"),
    "G1-6": lambda meta: meta.get("grade") in _EARLY_GRADES,
    "G7-12": lambda meta: bool(meta.get("grade")) and meta.get("grade") not in _EARLY_GRADES,
}
"""The official report's subsets. TXT and IMG overlap; NO has neither hint nor image."""


class ScienceQAAccuracy(Metric):
    """Per cent of questions answered with the right option's letter, in all and by subset."""

    rule = "scienceqa/llava-parser: a letter, 'A. ...' or one 'The answer is A.'; unparsed is wrong"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; a subset without questions has no figure."""
        pairs = list(zip(predictions, records, strict=True))
        parsed = [read_letter(prediction, len(record.meta["choices"])) for prediction, record in pairs]
        right = [
            float(letter is not None and ascii_uppercase.index(letter) == record.meta["answer_index"])
            for letter, record in zip(parsed, records, strict=True)
        ]
        return Scores(_figures(right, [record.meta for record in records]), right, parsed)


def read_letter(prediction: str, choices: int) -> str | None:
    """The option's letter that a prediction gives, or None.

    Args:
        prediction: what the model wrote.
        choices: how many choices the question has.
    """
    text = prediction.strip()
    if text in tuple(_LETTERS):
        letter = text
    elif text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _SENTENCE.findall(text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in ascii_uppercase[:choices] else None


def _figures(right: Sequence[float], metas: Sequence[Meta]) -> dict[str, float]:
    figures = {"accuracy": _per_cent(right)}
    for name, belongs in SUBSETS.items():
        subset = [score for score, meta in zip(right, metas, strict=True) if belongs(meta)]
        if subset:
            figures[f"accuracy/{name}"] = _per_cent(subset)
    return figures


def _per_cent(right: Sequence[float]) -> float:
    return 100 * sum(right) / len(right) if right else 0.0
