"""Listed: a list of named things against the list of what is there; and what is named but is not there.

Our own, for images whose content is known in full, as that of generated scenes is. It is to lists what CHAIR
(Rohrbach et al. 2018, arXiv 1809.02156) is to captions. Both lists are cut at commas; a name is compared in lower
case, without surrounding space and full stop; `nothing` and `none` are the empty list. With `right` the names that
both lists have (as often as both have them), of each answer:

    precision = right / named       recall = right / there       f1 = 2 * right / (named + there)
    hallucination_rate = answers that name a thing that is not there / answers
    hallucinated       = named things that are not there / named things, over all answers

f1, precision and recall are means over the answers; where both lists are empty they are 1, and where one is, 0.
A name that is said more often than it is there costs precision, and is no hallucination: the thing is there. Where
`meta["things"]` lists all names there can be, what is none of them is no thing: wrong, but not hallucinated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_mllm.metrics.base import Case, Given, Metric, Scores, Variant, mean, per_cent
from peft_mllm.metrics.pairs import read_pairs
from peft_mllm.record import Record

EMPTY = frozenset({"", "nothing", "none"})
"""Names that stand for no thing."""


class Listed(Metric):
    """F1 of the lists, and how much is named that is not there."""

    source = "our own, for images whose content is known in full"
    variants = {
        "plain": Variant(
            "listed/plain: names between commas, in lower case; mean F1 of each answer's list (per cent)",
            "mean(2 |named and there| / (|named| + |there|)), hallucinated = named and not there",
        ),
    }
    files = "lists of JSON or JSON lines with id and answer; LLaVA records; a run's predictions"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each list; an answer that is empty, or names no thing that there can be, is not understood.

        Raises:
            DataError: there is nothing to score.
        """
        precisions, recalls, f1s, parsed, details = [], [], [], [], []
        mentions = 0
        for prediction, record in zip(predictions, records, strict=True):
            named, there = names_of(prediction), names_of(record.answer)
            right = (Counter(named) & Counter(there)).total()
            precisions.append(_ratio(right, len(named), both_empty=not there))
            recalls.append(_ratio(right, len(there), both_empty=not named))
            f1s.append(_ratio(2 * right, len(named) + len(there), both_empty=True))
            things = [name for name in named if name in record.meta.get("things", named)]
            mentions += len(things)
            details.append({"named": things, "hallucinated": [name for name in things if name not in there]})
            understood = things or (not named and prediction.strip())
            parsed.append((", ".join(things) or "nothing") if understood else None)
            if not prediction.strip():  # silence is no list, not even where the list is empty
                precisions[-1] = recalls[-1] = f1s[-1] = 0.0
        wrong = [len(each["hallucinated"]) for each in details]
        values = {
            "f1": per_cent(f1s),
            "precision": per_cent(precisions),
            "recall": per_cent(recalls),
            "hallucination_rate": 100 * mean(float(number > 0) for number in wrong),
            "hallucinated": 100 * sum(wrong) / mentions if mentions else 0.0,
        }
        return Scores(values, f1s, parsed, details)

    def read(self, given: Given) -> Case:
        """Read answers and references."""
        return read_pairs(given)


def names_of(text: str) -> list[str]:
    """The names in a list: `Red circle, blue  cross.` gives `red circle` and `blue cross`."""
    names = (" ".join(piece.lower().split()).rstrip(".").rstrip() for piece in text.split(","))
    return [name for name in names if name not in EMPTY]


def _ratio(part: int, whole: int, *, both_empty: bool) -> float:
    """A quotient; of nothing it is 1 where nothing is what there should be."""
    return part / whole if whole else float(both_empty)
