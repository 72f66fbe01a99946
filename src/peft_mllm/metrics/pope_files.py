"""POPE's files: labels by set, and answers that the official scripts join to them by order.

Order is all that the official answers have, so wherever an answer also says what was asked, that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Prediction, reference
from peft_mllm.metrics.reading import Row, answer_of, image_key, one_file, read
from peft_mllm.record import Record

_SETS = ("random", "popular", "adversarial")
_QUESTION = ("question", "prompt", "text")
_IDS = ("question_id",)

Answers = Mapping[str, Sequence[tuple[str, Row]]]
"""The answers of each set, each with its own id; an empty set's name is the only set."""


def read_sets(given: Given) -> Case:
    """Read the labels of each set and the answers to them.

    Raises:
        DataError: numbers, ids or questions do not fit; names what to give besides.
    """
    labels = {path: _labels(path, set_name(path)) for path in given.references}
    records = [record for each in labels.values() for record in each]
    names = [each[0].meta["category"] for each in labels.values()]
    if len(set(names)) < len(names):
        raise DataError(f"Two label files are of one set ({', '.join(names)}). Name them like coco_pope_random.json.")
    dropped = 0
    if given.questions:
        by_set, dropped = _by_category(given)
    elif len(given.predictions) == len(labels):
        by_set = _by_file(given.predictions, names)
    else:
        by_set = _by_own_category(one_file(given.predictions, "--predictions"), names)
    unknown = sorted(by_set.keys() - set(names))
    if unknown and not given.partial:
        raise DataError(
            f"There are answers of the sets {', '.join(unknown)}, and no label file for them. Give one as "
            "--references, or --partial."
        )
    predictions = []
    for name, own in zip(names, labels.values(), strict=True):
        predictions += _join(own, by_set.get(name, ()), name, partial=given.partial)
    dropped += sum(len(by_set[name]) for name in unknown)
    return Case(predictions, records, dropped=dropped)


def set_name(path: Path) -> str:
    """The set that a label file is of, by its name: `coco_pope_random.json` is `random`."""
    stem = path.stem.lower()
    found = next((name for name in _SETS if name in stem), None)
    return found or stem.rsplit("pope_", 1)[-1]


def _labels(path: Path, name: str) -> list[Record]:
    records = []
    for number, row in enumerate(read(path).rows("annotations", "data", "questions"), start=1):
        label = row.text(["label", "answer"], "label").strip().lower()
        if label not in ("yes", "no"):
            row.fail(f"the label is {label!r}, and must be yes or no.")
        own = row.key(_IDS) if _has_id(row) else str(number)
        question = next((row.value[key] for key in _QUESTION if isinstance(row.value.get(key), str)), "")
        meta = {"category": name, "image": _image(row), "has_id": _has_id(row)}
        records.append(reference(f"{name}/{own}", label, question=question, source=row.place, **meta))
    return records


def _rows(path: Path) -> list[Row]:
    return read(path).rows("predictions", "results")


def _by_file(paths: Sequence[Path], names: Sequence[str]) -> Answers:
    """One file of answers for each set: by their names if they have those of the sets, else in the same order."""
    mine = [set_name(path) for path in paths]
    order = mine if sorted(mine) == sorted(names) else names
    return {name: [_own(row) for row in _rows(path)] for name, path in zip(order, paths, strict=True)}


def _by_own_category(path: Path, names: Sequence[str]) -> Answers:
    """One file of answers to several sets, each of which says its category."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in _rows(path):
        if not isinstance(row.value.get("category"), str):
            row.fail(
                f"does not say which of the {len(names)} sets it is of. Give LLaVA's question file as --questions, "
                "or one file of answers for each set, in the order of the label files."
            )
        found.setdefault(row.value["category"], []).append(_own(row))
    return found


def _by_category(given: Given) -> tuple[Answers, int]:
    """Answers with a question file that has each question's category, and how many answer none of its questions."""
    questions = {row.key(_IDS): row for path in given.questions for row in read(path).rows("questions", "data")}
    found: dict[str, list[tuple[str, Row]]] = {}
    seen: dict[str, str] = {}
    unknown, twice = [], []
    for path in given.predictions:
        for row in _rows(path):
            key = row.key(_IDS)
            if key in seen:
                twice.append(key)
            if key not in questions:
                unknown.append(key)
                continue
            seen[key] = row.place
            asked = questions[key]
            # the question file's words, so that the order can be compared with the labels'
            value = {**row.value, "question": asked.value.get("text", ""), "image": asked.value.get("image", "")}
            category = asked.text(["category"], "category")
            found.setdefault(category, []).append(("", Row(value, row.place)))
    missing = [key for key in questions if key not in seen]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:10])}{' ...' if len(keys) > 10 else ''}"
        for keys, what in ((missing, "missing"), (unknown, "extra"), (twice, "duplicate"))
        if keys and not (given.partial and what != "duplicate")
    ]
    if problems:
        raise DataError(f"The ids of the answers are not those of the questions. {'; '.join(problems)}.")
    return found, len(unknown)


def _own(row: Row) -> tuple[str, Row]:
    return (row.key(_IDS) if _has_id(row) else "", row)


def _has_id(row: Row) -> bool:
    """Whether an entry has an id of its own: its image has several questions."""
    return "question_id" in row.value


def _image(row: Row) -> str:
    """What an entry's image is called, the same for COCO's number, its file name and a path; empty without one."""
    image: Any = row.value.get("image")
    if isinstance(image, bool) or not isinstance(image, (str, int)):
        return ""
    return Path(image_key(Path(str(image)).name)).stem


def _join(
    labels: Sequence[Record], answers: Sequence[tuple[str, Row]], name: str, *, partial: bool
) -> list[Prediction]:
    """The answers of a set with the keys of their labels: by id where all have one, else by order."""
    if answers and all(own for own, _ in answers) and all(record.meta["has_id"] for record in labels):
        return [Prediction(f"{name}/{own}", answer_of(row), row.place) for own, row in answers]
    if len(answers) != len(labels) and not (partial and _all_found(labels, answers)):
        old = " LLaVA-1.5's question file has the older random set of 2,910 questions." if len(answers) == 2910 else ""
        raise DataError(
            f"The set '{name}' has {len(labels)} labels and {len(answers)} answers, and they are joined by order: "
            f"give them all, in the labels' order.{old}"
        )
    if len(answers) != len(labels):
        return _by_question(labels, answers)
    _check_order(labels, answers, name)
    return [Prediction(record.id, answer_of(row), row.place) for record, (_, row) in zip(labels, answers, strict=True)]


def _asked(row: Row) -> str:
    """What an answer says was asked: the first line, in lower case."""
    keys = ("question", "prompt") if "text" in row.value and "answer" not in row.value else _QUESTION
    found = next((row.value[key] for key in keys if isinstance(row.value.get(key), str)), "")
    return found.strip().split("\n")[0].strip().lower()


def _label_question(record: Record) -> str:
    return record.question[0].text.strip().lower()


def _check_order(labels: Sequence[Record], answers: Sequence[tuple[str, Row]], name: str) -> None:
    """Refuse answers whose question is another label's: they are in another order."""
    known = {_label_question(record) for record in labels}
    wrong = [
        f"{row.place}: answers {_asked(row)!r}{_of(_image(row))}, "
        f"the label asks {_label_question(record)!r}{_of(record.meta['image'])}"
        for record, (_, row) in zip(labels, answers, strict=True)
        if _differs(record, row, known)
    ]
    if wrong:
        shown = "\n  ".join(wrong[:5])
        raise DataError(f"{len(wrong)} answers of the set '{name}' are not in the order of the labels:\n  {shown}")


def _of(image: str) -> str:
    return f" of image {image}" if image else ""


def _differs(record: Record, row: Row, known: set[str]) -> bool:
    asked, image = _asked(row), _image(row)
    if asked and asked != _label_question(record) and asked in known:
        return True
    return bool(image and record.meta["image"] and image != record.meta["image"])


def _all_found(labels: Sequence[Record], answers: Sequence[tuple[str, Row]]) -> bool:
    known = {(record.meta["image"], _label_question(record)) for record in labels}
    return all((_image(row), _asked(row)) in known for _, row in answers)


def _by_question(labels: Sequence[Record], answers: Sequence[tuple[str, Row]]) -> list[Prediction]:
    """Part of a set's answers, by image and question; the first label of a pair takes its first answer."""
    free: dict[tuple[str, str], list[str]] = {}
    for record in labels:
        free.setdefault((record.meta["image"], _label_question(record)), []).append(record.id)
    predictions = []
    for _, row in answers:
        same = free[_image(row), _asked(row)]
        key = same.pop(0) if len(same) > 1 else same[0]
        predictions.append(Prediction(key, answer_of(row), row.place))
    return predictions
