"""IconQA accuracy: the right choice or the right string.

Lu et al. 2021 (arXiv 2110.13214); source: IconQA's run_*/eval.py and tools/sub_acc.py.

    accuracy = 100 * mean(str(prediction) == str(answer))

`answer` is the index of a choice (`choose_txt`, `choose_img`) or a string (`fill_in_blank`). A model that writes
text is compared with the text of the right choice; no letters, no numbers for words, no search in a sentence.
A problem counts in each of its skills, as in sub_acc.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, by_group, per_cent, reference
from peft_mllm.metrics.reading import Document, Row, answer_of, in_words, read
from peft_mllm.metrics.splits import asked_ids, beside, smallest_split
from peft_mllm.record import Record

_TASKS = ("choose_img", "choose_txt", "fill_in_blank")
_GRADES = ("prek", "kindergarten", "grade1", "grade2", "grade3")
_NO_CHOICE = "\0"  # an index that is none: equals no text


class IconQAAccuracy(Metric):
    """Per cent of questions answered with the right string, in all, by sub-task, grade and, where known, skill."""

    source = "IconQA run_*/eval.py and tools/sub_acc.py"
    variants = {
        "strict": Variant(
            "iconqa/strict: the string is the choice's text or the answer as it stands; else wrong",
            "str(prediction) == str(answer)",
        ),
        "normalised": Variant(
            "iconqa/normalised: equals the choice's text or the answer after strip and lower; else wrong",
            "lower(strip(prediction)) == lower(strip(answer))",
            "forgives 'Half' for 'half' and a space; for models that write text",
        ),
    }
    files = (
        "problems.json, with pid_splits.json and pid2skills.json beside it or given, or a folder of problems "
        "with data.json; official result files with `results`, or answers as JSON lines"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction; one that equals none of the choices is unparsed."""
        plain = _plain if self.variant == "normalised" else str
        pairs = list(zip(predictions, records, strict=True))
        right = [float(plain(prediction) == plain(record.answer)) for prediction, record in pairs]
        parsed = [
            next((choice for choice in record.meta["choices"] if plain(choice) == plain(prediction)), None)
            if record.meta.get("choices")
            else prediction.strip() or None
            for prediction, record in pairs
        ]
        tasks = [[record.meta.get("task", "")] for record in records]
        grades = [[record.meta.get("grade", "")] for record in records]
        skills = [record.meta.get("skills", ()) for record in records]
        values = {
            "accuracy": per_cent(right),
            **by_group("accuracy", right, tasks, order=_TASKS),
            **by_group("accuracy", right, grades, order=_GRADES),
            **by_group("accuracy", right, skills),
        }
        return Scores(values, right, parsed)

    def read(self, given: Given) -> Case:
        """Read problems and results; the split that is scored is the one that the results are of."""
        records, splits = _references(given.references)
        by_id = {record.id: record for record in records}
        predictions = [each for path in given.predictions for each in _predictions(read(path), by_id)]
        keys = {prediction.key for prediction in predictions}
        if given.questions:
            ids = asked_ids(given.questions)
        elif splits:
            ids = _of_each_task(keys, splits)
        else:
            kinds = {by_id[key].meta["task"] for key in keys if key in by_id} or {
                record.meta["task"] for record in records
            }
            ids = {record.id for record in records if record.meta["task"] in kinds}
        return Case(predictions, [record for record in records if record.id in ids])


def _plain(text: str) -> str:
    return text.strip().lower()


def _of_each_task(keys: set[str], splits: Mapping[str, Sequence[str]]) -> set[str]:
    """The ids of the split of each sub-task that has some of the keys: `fill_in_blank_test`, `choose_txt_test`."""
    found: set[str] = set()
    for task in _TASKS:
        own = {name: ids for name, ids in splits.items() if name.startswith(task)}
        mine = keys & set().union(*map(set, own.values()))
        if mine:
            found |= smallest_split(mine, own)
    return found or smallest_split(keys, splits)


def _references(paths: Sequence[Path]) -> tuple[list[Record], dict[str, list[str]]]:
    """The problems, and the ids of each split where a file of splits lies there."""
    folders = [path for path in paths if path.is_dir() and not (path / "problems.json").is_file()]
    problems = {row.place: row for folder in folders for row in _in_folder(folder)}
    splits: dict[str, list[str]] = {}
    skills: dict[str, list[str]] = {}
    files = [path for path in paths if path not in folders]
    for path in beside(files, "pid_splits.json", "pid2skills.json", of="problems.json"):
        values = read(path).mapping("id: problem")
        if not all(isinstance(value, list) for value in values.values()):
            problems |= {(place := f"{path}, problem {pid}"): Row(value, place) for pid, value in values.items()}
        elif "skill" in path.name:
            skills |= {pid: [str(name) for name in names] for pid, names in values.items()}
        else:
            splits |= {name: [str(pid) for pid in pids] for name, pids in values.items()}
    if not problems:
        raise DataError(f"{', '.join(map(str, paths))}: no problems. Give problems.json as --references.")
    return [_record(row, skills) for row in problems.values()], splits


def _in_folder(folder: Path) -> list[Row]:
    """The problems of the layout {sub-task}/{id}/data.json."""
    rows = []
    for path in sorted(folder.rglob("data.json")):
        rows.append(
            Row(
                {"ques_type": path.parent.parent.name, **read(path).mapping("a problem")},
                f"{path}, problem {path.parent.name}",
            )
        )
    return rows


def _record(row: Row, skills: Mapping[str, Sequence[str]]) -> Record:
    if not isinstance(row.value, Mapping):
        row.fail(f"expected an object, found {in_words(row.value)}.")
    pid = row.place.rsplit(" ", 1)[1]
    choices = [str(choice) for choice in row.get("choices", list, [])]
    answer = row.find(["answer"], "answer")
    index = answer if choices else None
    if choices:
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            row.fail(f"answer {answer!r} is not the index of one of its {len(choices)} choices.")
        answer = choices[answer]
    return reference(
        pid,
        str(answer),
        question=row.get("question", str, ""),
        source=row.place,
        choices=tuple(choices),
        index=index,
        task=row.get("ques_type", str, ""),
        grade=row.get("grade", str, ""),
        skills=tuple(skills.get(pid, ())),
    )


def _predictions(document: Document, records: Mapping[str, Record]) -> list[Prediction]:
    """Of an official result file {id: index or string}, or of a list of answers in text."""
    if not document.has("results", dict):
        return [Prediction(row.key(), answer_of(row), row.place) for row in document.rows("predictions", "results")]
    results = document.value["results"]
    if not results:
        raise DataError(f"{document.path}: 'results' is empty; there is nothing to score.")
    return [
        Prediction(pid, _official_text(document.path, pid, value, records.get(pid)), f"{document.path}, results[{pid}]")
        for pid, value in results.items()
    ]


def _official_text(path: Path, pid: str, value: Any, record: Record | None) -> str:
    """What an official result says: where there are choices it is an index, and stands for its text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{path}, results[{pid}]: is {value!r}, {in_words(value)}, and must be an index or text.")
    choices = record.meta["choices"] if record else ()
    if not choices:
        return str(value)
    index = str(value)
    if not index.isdecimal() or int(index) >= len(choices):
        return _NO_CHOICE
    chosen = choices[int(index)]
    # two choices may read alike: the other of them is another index, and wrong
    return _NO_CHOICE if record and chosen == record.answer and int(index) != record.meta["index"] else chosen
