"""IconQA: questions about abstract diagrams, from pre-school to third grade.

Lu et al. 2021, "IconQA" (arXiv 2110.13214); CC BY-NC-SA 4.0. Two of its sub-tasks, each a task here:
`choose_txt` (18,946 / 6,316 / 6,316 questions; the answer is the text of a choice) and `fill_in_blank`
(10,913 / 3,638 / 3,638; the answer is a short string). Three official layouts are recognised:

    problems.json, pid_splits.json, iconqa/{train,val,test}/{sub-task}/{pid}/image.png    the full release
    {train,val,test}/{sub-task}/{pid}/{data.json,image.png}                               its folder `iconqa`
    {sub-task}/{pid}/{data.json,image.png}                                                the examples

The examples have no splits. There a question's split follows from a hash of its id, 60 : 20 : 20, so it is
the same on every machine; a logged warning says so, and so does each record's `source`. Where
`pid2skills.json` lies in the root, a record's meta names the question's skills.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_mllm.data.images import FileImage
from peft_mllm.data.official import check_each, check_images, check_index, read_object, read_split
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.tasks.base import Split, Task, TaskOptions

log = logging.getLogger(__name__)

_FOLDER: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
_REMEDY = "Download iconqa_data.zip from https://iconqa.github.io and set `root` to what it unpacks."


class IconQAOptions(TaskOptions):
    """Where the data is."""

    root: Path = Field(description="folder in one of the official layouts")


class Question(BaseModel):
    """What both sub-tasks have."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    question: str
    grade: str = ""
    label: str = ""


class ChooseText(Question):
    """One entry of `choose_txt`."""

    choices: tuple[str, ...] = Field(min_length=2)
    answer: int

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> ChooseText:
        check_index(self.answer, self.choices)
        return self

    def turns(self) -> tuple[str, str]:
        """The paper's template (arXiv 2406.05130, Table 10) and the choice's text."""
        choices = ", ".join(self.choices)
        request = "Choose an option from the choices to answer the question."
        return f"{self.question} Choices: {choices} {request}", self.choices[self.answer]

    def meta(self) -> dict[str, Any]:
        """What the metric needs beside the answer."""
        return {"choices": self.choices, "answer_index": self.answer}


class FillInBlank(Question):
    """One entry of `fill_in_blank`."""

    answer: str = Field(min_length=1)

    def turns(self) -> tuple[str, str]:
        """The paper's template (arXiv 2406.05130, Table 10) and the string to fill in."""
        return f"{self.question} Fill in the blanks in () or answer this question.", self.answer

    def meta(self) -> dict[str, Any]:
        """What the metric needs beside the answer: nothing."""
        return {}


AnyQuestion = ChooseText | FillInBlank


class IconQATxt(Task):
    """IconQA's `choose_txt`: choose one of the given texts."""

    Options = IconQAOptions
    metric = "iconqa:normalised"
    max_new_tokens = 32  # a choice can be a short sentence, and a cut one equals none of the choices

    def __init__(self, options: TaskOptions):
        assert isinstance(options, IconQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions, in the order of pid_splits.json or of the ids."""
        found = _find(self.options.root, "choose_txt", split)
        questions = check_each(((at.pid, at.entry) for at in found), ChooseText, file=self.options.root)
        return _records(self.options.root, found, questions)


class IconQABlank(Task):
    """IconQA's `fill_in_blank`: answer with a short string."""

    Options = IconQAOptions
    metric = "iconqa:normalised"

    def __init__(self, options: TaskOptions):
        assert isinstance(options, IconQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions, in the order of pid_splits.json or of the ids."""
        found = _find(self.options.root, "fill_in_blank", split)
        questions = check_each(((at.pid, at.entry) for at in found), FillInBlank, file=self.options.root)
        return _records(self.options.root, found, questions)


class _Found(NamedTuple):
    """One problem as it lies on the disk."""

    pid: str
    entry: Any
    image: Path
    source: str


def _find(root: Path, kind: str, split: Split) -> list[_Found]:
    """Find a split's problems in whichever layout the root has."""
    if (root / "problems.json").is_file():
        return _find_released(root, kind, split)
    if (root / _FOLDER[split] / kind).is_dir():
        return _find_in_folder(root, root / _FOLDER[split] / kind, note="")
    if (root / kind).is_dir():
        return _find_example(root, kind, split)
    raise DataError(
        f"{root}: holds neither problems.json nor {_FOLDER[split]}/{kind}/ nor {kind}/, so it is in none of "
        f"IconQA's layouts. {_REMEDY}"
    )


def _find_released(root: Path, kind: str, split: Split) -> list[_Found]:
    entries = read_object(root / "problems.json", remedy=_REMEDY)
    pids = read_split(root / "pid_splits.json", f"{kind}_{_FOLDER[split]}", known=entries, remedy=_REMEDY)
    folder = root / "iconqa" / _FOLDER[split] / kind
    return [_Found(pid, entries[pid], folder / pid / "image.png", f"problems.json[{pid}]") for pid in pids]


def _find_example(root: Path, kind: str, split: Split) -> list[_Found]:
    note = "split by a hash of the id, 60 : 20 : 20"
    log.warning("%s has no official splits: %s", root / kind, note)
    found = _find_in_folder(root, root / kind, note=f" ({note})")
    return [at for at in found if hashed_split(at.pid) == split]


def _find_in_folder(root: Path, folder: Path, *, note: str) -> list[_Found]:
    pids = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=_numerically)
    return [_read_folder(root, folder / pid, note) for pid in pids]


def _read_folder(root: Path, folder: Path, note: str) -> _Found:
    file = folder / "data.json"
    entry = read_object(file, remedy=_REMEDY)
    return _Found(folder.name, entry, folder / "image.png", f"{file.relative_to(root)}{note}")


def hashed_split(pid: str) -> Split:
    """The split of a question where the release has none: 60 : 20 : 20 by SHA-256 of its id."""
    place = int.from_bytes(hashlib.sha256(pid.encode()).digest()[:8], "big") % 100
    if place < 60:
        return "train"
    return "validation" if place < 80 else "test"


def _numerically(pid: str) -> tuple[int, str]:
    return (int(pid) if pid.isdecimal() else 0, pid)


def _records(root: Path, found: Sequence[_Found], questions: Mapping[str, AnyQuestion]) -> list[Record]:
    check_images([at.image for at in found], root=root, remedy=_REMEDY)
    skills = _skills(root)
    return [_record(at, questions[at.pid], skills.get(at.pid, ())) for at in found]


def _skills(root: Path) -> dict[str, tuple[str, ...]]:
    file = root / "pid2skills.json"
    if not file.is_file():
        return {}
    return {pid: tuple(skills) for pid, skills in read_object(file, remedy=_REMEDY).items()}


def _record(at: _Found, question: AnyQuestion, skills: tuple[str, ...]) -> Record:
    ask, answer = question.turns()
    return Record(
        id=at.pid,
        turns=(Turn("user", f"{IMAGE_MARK}\n{ask}"), Turn("assistant", answer)),
        images=(FileImage(at.image),),
        meta={**question.meta(), "grade": question.grade, "label": question.label, "skills": skills},
        source=at.source,
    )
