"""A person's answers as a file, and what one file or two of them say.

Cohen 1960, "A coefficient of agreement for nominal scales": kappa = (p_o - p_e) / (1 - p_e), with p_o the share of
items on which both say the same, and p_e the share expected of two who answer at random, each at his own rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.files import read_json, write_json
from peft_mllm.study.statistics import Estimate, estimate_mean

FORMAT = "peft-mllm annotation 1"
YES, NO = "yes", "no"


@dataclass
class Answers:
    """What one annotator said.

    Attributes:
        items: digest of the captions that were judged.
        n: how many they are.
        annotator: who judged.
        answers: `yes` where a caption says what is not there, else `no`; only of the captions that were judged.
    """

    items: str
    n: int
    annotator: str
    answers: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file: it is on the disk when this returns."""
        write_json(path, {"format": FORMAT, "question": "hallucinated", **asdict(self)}, what="the answers")


def load_answers(path: Path) -> Answers:
    """Read a file of answers.

    Raises:
        DataError: it is none.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path} {error}.") from None
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise DataError(f"{path} is no file of answers; the annotation page's 'Save answers' writes one.")
    answers = value.get("answers")
    if not isinstance(answers, Mapping) or not set(answers.values()) <= {YES, NO}:
        raise DataError(f"{path}: its answers are not all '{YES}' or '{NO}'.")
    try:
        return Answers(str(value["items"]), int(value["n"]), str(value["annotator"]), dict(answers))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no file of answers: {error} is missing or wrong.") from None


def count(answers: Answers) -> dict[str, Any]:
    """How many captions an annotator found hallucinated, with the rate and its 95 % interval (Wilson), in per cent."""
    judged = [float(said == YES) for said in answers.answers.values()]
    rate = 100 * sum(judged) / len(judged) if judged else 0.0
    estimate = estimate_mean(judged, value=rate) if judged else Estimate(rate)
    return {
        "annotator": answers.annotator,
        "judged": len(judged),
        "of": answers.n,
        "hallucinated": int(sum(judged)),
        "rate": rate if judged else None,
        "interval": None if estimate.low is None else [estimate.low, estimate.high],
    }


def agreement(first: Answers, second: Answers) -> dict[str, Any]:
    """What two annotators agree on, over the captions that both judged.

    Raises:
        DataError: they judged other captions, or none in common.
    """
    if first.items != second.items:
        raise DataError("The two files are about different captions: their agreement means nothing.")
    both = [each for each in first.answers if each in second.answers]
    if not both:
        raise DataError("The two annotators judged no caption in common.")
    pairs = [(first.answers[each], second.answers[each]) for each in both]
    raw = sum(one == other for one, other in pairs) / len(pairs)
    return {
        "judged_by_both": len(both),
        "agreement": 100 * raw,
        "kappa": kappa(pairs),
        "both_yes": sum(pair == (YES, YES) for pair in pairs),
        "disagree": [each for each, (one, other) in zip(both, pairs, strict=True) if one != other],
    }


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa; None where both always say the same one thing, and chance alone would agree."""
    n = len(pairs)
    observed = sum(one == other for one, other in pairs) / n
    shares = [[sum(pair[k] == said for pair in pairs) / n for said in (YES, NO)] for k in (0, 1)]
    expected = sum(one * other for one, other in zip(*shares, strict=True))
    return None if expected == 1 else (observed - expected) / (1 - expected)
