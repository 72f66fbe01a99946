"""POPE: polling a model for objects ("Is there a dog in the image?").

Li et al. 2023 (arXiv 2305.10355); source: AoiDragon/POPE evaluate.py, LLaVA eval_pope.py, which read alike. An
answer is cut at its first full stop, loses its commas and is split at spaces; with a word "No", "not" or "no" it
is *no*, and everything else is *yes*: also "NO", "Nope" and nothing at all. With yes as the positive class:

    accuracy = (TP + TN) / N        precision = TP / (TP + FP)      recall = TP / (TP + FN)
    f1 = 2 * precision * recall / (precision + recall)              yes_ratio = (TP + FP) / N

Each of the sets (random, popular, adversarial) has its figures, `f1/random`; those without a set's name are the
means over the sets, as papers report them. A quotient without a denominator is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.metrics.base import Case, Given, Metric, Scores, Variant, mean
from peft_mllm.metrics.pope_files import read_sets
from peft_mllm.record import Record

SETS = ("random", "popular", "adversarial")


class POPE(Metric):
    """Accuracy, precision, recall, F1 and share of yes, of each set and on average."""

    source = "AoiDragon/POPE evaluate.py; LLaVA eval_pope.py"
    unit = "0-1"
    variants = {
        "official": Variant(
            "pope/official: no if a word of the first sentence is No, not or no; else yes",
            "yes and no by the official parser; nothing is unparsed",
        ),
        "strict": Variant(
            "pope/strict: the whole answer is yes or no after strip and lower; else wrong",
            "an answer that is neither is wrong in accuracy, and in none of TP, FP, FN",
            "as lmms-eval, but the share of yes is that of the answers, not of the labels; lower for long answers",
        ),
    }
    files = (
        "label files, one for each set, named like coco_pope_random.json; answers {question, answer} in the same "
        "order, one file for each set; or LLaVA's answers with its question file, which names each question's category"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; a record's set is its `meta["category"]`, its answer yes or no."""
        parse = parse_strict if self.variant == "strict" else parse_official
        parsed = [parse(prediction) for prediction in predictions]
        labels = [record.answer.strip().lower() for record in records]
        right = [float(given == label) for given, label in zip(parsed, labels, strict=True)]
        groups: dict[str, list[tuple[str | None, str]]] = {}
        for given, label, record in zip(parsed, labels, records, strict=True):
            groups.setdefault(str(record.meta.get("category") or "all"), []).append((given, label))
        order = sorted(groups, key=lambda name: (SETS.index(name) if name in SETS else len(SETS), name))
        figures = {name: _figures(groups[name]) for name in order}
        values = {name: mean(each[name] for each in figures.values()) for name in _figures([])}
        for group in order if order != ["all"] else ():
            values |= {f"{name}/{group}": value for name, value in figures[group].items()}
        return Scores(values, right, parsed)

    def read(self, given: Given) -> Case:
        """Read label files, and answers that are joined to them by id, by category, or by order."""
        return read_sets(given)


def parse_official(text: str) -> str:
    """Yes or no, as the official script reads an answer."""
    found = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(found) else "yes"


def parse_strict(text: str) -> str | None:
    """Yes or no where the whole answer is that, apart from case and surrounding space; else None."""
    plain = text.strip().lower()
    return plain if plain in ("yes", "no") else None


def _figures(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float]:
    count = {(given, label): 0.0 for given in ("yes", "no", None) for label in ("yes", "no")}
    for pair in pairs:
        count[pair] = count.get(pair, 0.0) + 1
    positives = count["yes", "yes"] + count["yes", "no"]
    precision = _ratio(count["yes", "yes"], positives)
    recall = _ratio(count["yes", "yes"], count["yes", "yes"] + count["no", "yes"])
    return {
        "accuracy": _ratio(count["yes", "yes"] + count["no", "no"], len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(positives, len(pairs)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
