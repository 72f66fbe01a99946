"""What the VQA-like data sets share: questions and annotations in VQA's format, ten answers, the short-answer prompts.

questions     {"questions": [{"question_id", "image_id", "question"}]}
annotations   {"annotations": [{"question_id", "answers": [{"answer", ...}], "answer_type", ...}]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from peft_mllm.data.official import check_each, refuse
from peft_mllm.data.prepare.release import Document, Files, Item
from peft_mllm.data.prepared import Line
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.tasks.base import Prompt

PAPER = "Zhou et al. 2024 (arXiv 2406.05130), Table 10"
LLAVA = "LLaVA-1.5"
QWEN_VL = "Qwen-VL eval_mm"
REQUEST = "Answer the question using a single word or phrase."

PAPER_SHORT = Prompt(f"{IMAGE_MARK}\n{{question}} {REQUEST}", 32, PAPER)
LLAVA_SHORT = Prompt(f"{IMAGE_MARK}\n{{question}}\n{REQUEST}", 128, LLAVA)
QWEN_SHORT = Prompt(f"{IMAGE_MARK}{{question}} Answer:", 10, QWEN_VL)

COCO = "http://images.cocodataset.org/zips"
COCO_MD5 = {"train": "0da8c0bd3d6becc4dcb32757491aca88", "val": "a3d79f5ed8d289b7a7554ce06a5782b3"}


class VQAEntry(BaseModel):
    """A question with its answers.

    Attributes:
        answers: as officially scored.
        best: the one to learn; the most frequent, the first of those, where the release names none.
        raw_answers: as people wrote them, where the release has both.
    """

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)
    best: str = ""
    raw_answers: tuple[str, ...] = ()
    answer_type: str = ""
    question_type: str = ""

    @property
    def answer(self) -> str:
        """The answer to learn."""
        return self.best or most_frequent(self.answers)


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of equals the first."""
    return Counter(answers).most_common(1)[0][0]


def coco_image(image_id: Any, year: str) -> tuple[str, tuple[str, ...]]:
    """A COCO image's file name, and where it may lie: `coco_image(9, "train2014")`.

    Raises:
        DataError: the id is no number.
    """
    try:
        name = f"COCO_{year}_{int(image_id):012d}.jpg"
    except ValueError:
        raise DataError(f"{year}: {image_id!r} is not the number of a COCO image. Is it another file?") from None
    return name, (f"{year}/{name}", name)


def read_coco(files: Files, official: str, *, version: str = "") -> list[Item]:
    """The questions of a split about COCO's images of 2014, in the order of their file.

    Args:
        files: of the release.
        official: train or val.
        version: what the names of the files begin with.

    Raises:
        DataError: a file has another shape, or the ids do not match.
    """
    year = f"{official}2014"
    pairs = read_pairs(
        files.read(f"{version}OpenEnded_mscoco_{year}_questions.json"),
        files.read(f"{version}mscoco_{year}_annotations.json"),
    )
    return [Item(str(key), entry, *coco_image(image, year)) for key, image, entry in pairs]


def read_pairs(questions: Document, annotations: Document) -> list[tuple[Any, Any, VQAEntry]]:
    """Question id, image id and entry of every question, in the order of the questions.

    Raises:
        DataError: a file has another shape, or the ids do not match.
    """
    asked = rows_of(questions, "questions", needs=("question_id", "image_id"))
    answered = {row["question_id"]: row for row in rows_of(annotations, "annotations", needs=("question_id",))}
    refuse(
        [str(row["question_id"]) for row in asked if row["question_id"] not in answered],
        Path(annotations.place),
        "questions have no annotation",
        remedy="Give questions and annotations of the same split and version.",
    )
    known = {row["question_id"] for row in asked}
    refuse(
        [str(key) for key in answered if key not in known],
        Path(questions.place),
        "annotations have no question",
        remedy="Give questions and annotations of the same split and version.",
    )
    once: dict[str, str] = {}  # six million answers are few different ones: one string for each
    entries = check_each(
        ((str(row["question_id"]), _entry(row, answered[row["question_id"]], once)) for row in asked),
        VQAEntry,
        file=Path(annotations.place),
    )
    return [(row["question_id"], row["image_id"], entries[str(row["question_id"])]) for row in asked]


def _entry(question: Mapping[str, Any], annotation: Mapping[str, Any], once: dict[str, str]) -> dict[str, Any]:
    answers = annotation.get("answers")
    if not isinstance(answers, list):
        return {"question": question.get("question"), "answers": answers}  # to be refused
    raw = [each["raw_answer"] for each in answers if isinstance(each, dict) and "raw_answer" in each]
    texts = answers_of(answers)
    best = annotation.get("multiple_choice_answer")
    return {
        "question": question.get("question"),
        "answers": [once.setdefault(text, text) if isinstance(text, str) else text for text in texts],
        "best": best if isinstance(best, str) else "",
        "raw_answers": raw,
        "answer_type": annotation.get("answer_type") or "",
        "question_type": annotation.get("question_type") or "",
    }


def rows_of(document: Document, key: str | None = None, *, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a list, which stands alone or under a key, each with the keys it needs.

    Raises:
        DataError: the file has another shape.
    """
    value = document.value
    if key is not None and isinstance(value, dict):
        if key not in value:
            raise DataError(f"{document.place}: has no '{key}' among {', '.join(list(value)[:8]) or 'nothing'}.")
        value = value[key]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        what = f"a list of objects{f' under {key!r}' if key else ''}"
        raise DataError(f"{document.place}: is not {what}. Is it another file?")
    refuse(
        [f"entry {number}" for number, row in enumerate(value, 1) if not all(is_key(row.get(name)) for name in needs)],
        Path(document.place),
        f"entries lack {' or '.join(needs)}",
        remedy="Is it another file, or another version?",
    )
    return value


def is_key(value: Any) -> bool:
    """Whether a value can name a question or an image."""
    return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""


def object_of(document: Document) -> dict[str, Any]:
    """A file whose top level is an object.

    Raises:
        DataError: it is not.
    """
    if not isinstance(document.value, dict):
        raise DataError(f"{document.place}: is not an object {{...}}. Is it another file?")
    return document.value


def answers_of(value: Any) -> Any:
    """Answers as tables have them: strings, or objects with `answer`; anything else as it is, to be refused."""
    if not isinstance(value, list):
        return value
    return [each.get("answer") if isinstance(each, Mapping) else each for each in value]


def table_items(rows: Sequence[Mapping[str, Any]], *, place: str, image: str, fields: Mapping[str, str]) -> list[Item]:
    """Items of a table with `question_id`, `question` and `answers`, one question a row.

    Args:
        rows: the table.
        place: what to call it in messages.
        image: the column that names the image; questions with the same image share one file.
        fields: our names of further columns.
    """
    entries = check_each(
        (
            (
                str(row["question_id"]),
                {
                    "question": row.get("question"),
                    "answers": answers_of(row.get("answers")),
                    **{name: row.get(column) or "" for name, column in fields.items()},
                },
            )
            for row in rows
        ),
        VQAEntry,
        file=Path(place),
    )
    return [
        Item(key := str(row["question_id"]), entries[key], image_name(row.get(image, key)), row=number)
        for number, row in enumerate(rows)
    ]


def image_name(key: Any) -> str:
    """A file name for a table's image: it has none of its own. Its content says what kind it is."""
    text = Path(str(key)).name
    return text if Path(text).suffix else f"{text}.jpg"


def vqa_record(line: Line, entry: VQAEntry, text: str, **meta: Any) -> Record:
    """The record of a question with many answers."""
    assert line.image is not None, "every question of these sets has an image"
    return Record(
        id=line.id,
        turns=(Turn("user", text), Turn("assistant", entry.answer)),
        images=(line.image,),
        meta={
            "answers": entry.answers,
            "answer_type": entry.answer_type,
            "question_type": entry.question_type,
            **meta,
        },
        source=line.source,
    )
