"""ScienceQA accuracy: the right option, read from what a model wrote.

Lu et al. 2022 (arXiv 2209.09513); source: ScienceQA's models/run_gpt3.py and tools/evaluate_acc.py, LLaVA's
eval_science_qa.py. With x the option read from an answer:

    accuracy = 100 * mean(x == answer)

LLaVA reads, in this order: the text is a letter A to E; it begins with a letter A to E and ". "; "The answer is
X" and one more character occurs exactly once. The ScienceQA authors read only the last, and where that fails
they *guess*: it lifts GPT-3 from 72.2 to 75.2, and published figures hold such guesses. Their guesses hang on
the state of a generator; ours on the question's id alone, so they are the same every time. The third variant
takes the options that an official result file stores, guesses included, and so gives the published figure.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, per_cent, reference
from peft_mllm.metrics.reading import Document, Row, in_words, one_file, predictions_of, read
from peft_mllm.metrics.splits import asked_ids, beside, smallest_split
from peft_mllm.record import Record

_LETTERS = "ABCDE"
# The last dot is any character: meant as a full stop, but published figures were made with it as it is.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_INDEX = re.compile(r"-?[0-9]{1,18}")

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
    """Per cent of questions answered with the right option, in all and by subset."""

    source = "ScienceQA models/run_gpt3.py and tools/evaluate_acc.py; LLaVA eval_science_qa.py"
    variants = {
        "llava": Variant(
            "scienceqa/llava: a letter, 'A. ...' or one 'The answer is A.'; unparsed is wrong",
            "x = LLaVA's reading; right if x is the answer; nothing read is wrong",
        ),
        "official": Variant(
            "scienceqa/official: one 'The answer is A.'; unparsed is a guess, seeded by the question's id",
            "x = the one hit of 'The answer is X.', else a random option; right if x is the answer",
            "guesses lift a model that answers in other words, by up to 50 points on two choices",
        ),
        "stored": Variant(
            "scienceqa/stored: the option that an official result file stores, its guesses included",
            "x = results[id]; right if x is the answer",
            "the published figure of a result file; its guesses cannot be told from answers",
        ),
    }
    files = (
        "problems.json (with pid_splits.json beside it or given); LLaVA's answers as JSON lines, or an official "
        "result file with `outputs` and `results`"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; a subset without questions has no figure."""
        read_one = {"llava": _llava, "official": _official, "stored": _stored}[self.variant]
        parsed, right = [], []
        for prediction, record in zip(predictions, records, strict=True):
            choices = len(record.meta["choices"])
            letter = read_one(prediction, choices)
            parsed.append(letter)
            if letter is None and self.variant == "official":
                letter = _guess(record.id, choices)
            right.append(float(letter is not None and ascii_uppercase.index(letter) == record.meta["answer_index"]))
        return Scores(_figures(right, [record.meta for record in records]), right, parsed)

    def read(self, given: Given) -> Case:
        """Read problems and answers; the split that is scored is the one that the answers are of."""
        path = one_file(given.predictions, "--predictions")
        predictions = _predictions(read(path), stored=self.variant == "stored")
        problems, splits = _problems(given.references)
        keys = {prediction.key for prediction in predictions}
        ids = asked_ids(given.questions) if given.questions else smallest_split(keys, splits)
        return Case(predictions, [_record(Row(*problems[pid])) for pid in problems if pid in ids])


def read_letter(prediction: str, choices: int) -> str | None:
    """The option's letter that a prediction gives as LLaVA reads it, or None.

    Args:
        prediction: what the model wrote.
        choices: how many choices the question has.
    """
    return _llava(prediction, choices)


def _llava(text: str, choices: int) -> str | None:
    if text in tuple(_LETTERS):
        return _option(text, choices)
    if text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        return _option(text[0], choices)
    return _official(text, choices)


def _official(text: str, choices: int) -> str | None:
    found = _SENTENCE.findall(text)
    return _option(found[0], choices) if len(found) == 1 else None


def _stored(text: str, choices: int) -> str | None:
    if not _INDEX.fullmatch(text):
        raise DataError(
            f"The variant 'stored' scores the stored options of an official result file, and {text!r} is no index. "
            "Use another variant to score what a model wrote."
        )
    index = int(text)
    return ascii_uppercase[index] if 0 <= index < choices else None


def _option(letter: str, choices: int) -> str | None:
    return letter if letter in ascii_uppercase[:choices] else None


def _guess(identity: str, choices: int) -> str:
    return ascii_uppercase[random.Random(f"scienceqa:{identity}").randrange(choices)]


def _figures(right: Sequence[float], metas: Sequence[Meta]) -> dict[str, float]:
    figures = {"accuracy": per_cent(right)}
    for name, belongs in SUBSETS.items():
        subset = [score for score, meta in zip(right, metas, strict=True) if belongs(meta)]
        if subset:
            figures[f"accuracy/{name}"] = per_cent(subset)
    return figures


def _predictions(document: Document, *, stored: bool) -> list[Prediction]:
    """An official result file's `results` or `outputs`, or answers as a list."""
    if document.has("results", dict) or document.has("outputs", dict):
        name = "results" if stored else "outputs"
        values = document.mapping("results, outputs").get(name)
        if not isinstance(values, dict) or not values:
            raise DataError(f"{document.path}: has no '{name}', or it is empty. Its other half needs another variant.")
        return [_official_entry(document.path, name, pid, value) for pid, value in values.items()]
    if stored:
        raise DataError(f"{document.path}: has no 'results' {{id: index}}, which the variant 'stored' scores.")
    return predictions_of(document)


def _official_entry(path: Path, name: str, pid: str, value: object) -> Prediction:
    place = f"{path}, {name}[{pid}]"
    text = str(value) if name == "results" and isinstance(value, int) and not isinstance(value, bool) else value
    # the official script takes int() of what is stored, so an index may be text
    if not isinstance(text, str) or (name == "results" and not _INDEX.fullmatch(text)):
        raise DataError(
            f"{place}: is {value!r}, {in_words(value)}, and must be {'an index' if name == 'results' else 'text'}."
        )
    return Prediction(pid, text, place)


def _problems(paths: Sequence[Path]) -> tuple[dict[str, tuple[dict[str, Any], str]], dict[str, list[str]]]:
    """The problems by id with their place, and the ids of each split."""
    problems: dict[str, tuple[dict[str, Any], str]] = {}
    splits: dict[str, list[str]] = {}
    for path in beside(paths, "pid_splits.json", of="problems.json"):
        document = read(path)
        values = document.mapping("id: problem")
        if all(isinstance(value, list) for value in values.values()):
            splits |= {name: [str(pid) for pid in pids] for name, pids in values.items()}
        else:
            problems |= {pid: (value, f"{path}, problem {pid}") for pid, value in values.items()}
    if not problems:
        raise DataError(f"{', '.join(map(str, paths))}: no problems. Give problems.json as --references.")
    if not splits:
        for pid, (value, _) in problems.items():
            name = value.get("split") if isinstance(value, dict) else None
            splits.setdefault(str(name or "all"), []).append(pid)
    return problems, splits


def _record(row: Row) -> Record:
    if not isinstance(row.value, Mapping):
        row.fail(f"expected an object, found {in_words(row.value)}.")
    choices = row.get("choices", list, [])
    index = row.find(["answer"], "answer")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        row.fail(f"answer {index!r} is not the index of one of its {len(choices)} choices.")
    return reference(
        row.place.rsplit(" ", 1)[1],
        ascii_uppercase[index],
        question=row.get("question", str, ""),
        source=row.place,
        choices=tuple(choices),
        answer_index=index,
        subject=row.get("subject", str, ""),
        grade=row.get("grade", str, ""),
        hint=row.get("hint", str, ""),
        has_image=bool(row.value.get("image")),
    )
