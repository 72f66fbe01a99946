"""IconQA: questions about abstract diagrams, from pre-school to third grade.

Lu et al. 2021, "IconQA" (arXiv 2110.13214); CC BY-NC-SA 4.0. Two of its sub-tasks, each a task here:
`choose_txt` (18,946 / 6,316 / 6,316 questions; the answer is the text of a choice) and `fill_in_blank`
(10,913 / 3,638 / 3,638; the answer is a short string). Three official layouts are recognised:

    problems.json, pid_splits.json, iconqa/{train,val,test}/{sub-task}/{pid}/image.png    the full release
    {train,val,test}/{sub-task}/{pid}/{data.json,image.png}                               its folder `iconqa`
    {sub-task}/{pid}/{data.json,image.png}                                                the examples

The examples have no splits. There a question's split follows from a hash of its id, 60 : 20 : 20, so it is
the same on every machine; a logged warning says so, and so does each record's `source`. Where
`pid2skills.json` lies in the root, a record's meta names the question's skills. Prepared folders are taken as well.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_mllm.data.images import FileImage
from peft_mllm.data.official import check_each, check_images, check_index, pick_split, read_object, read_split
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line, is_prepared
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.tasks.base import Prompt, Split, Task, TaskOptions
from peft_mllm.tasks.reading import SampledOptions, choose, open_split, origin
from peft_mllm.tasks.vqa_files import object_of

log = logging.getLogger(__name__)
_COLUMNS = ("question_id", "question", "answer", "choices", "ques_type")
Kind = Literal["choose_txt", "fill_in_blank"]

_FOLDER: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
_REMEDY = "Download iconqa_data.zip from https://iconqa.github.io and set `root` to what it unpacks."


class IconQAOptions(SampledOptions):
    """Where the data is, and how much of it is used."""

    root: Path
    """Prepared folder, or one in one of the official layouts."""
    prompt: Literal["paper"] = "paper"
    """Whose words ask the question; LLaVA and Qwen-VL have none for IconQA."""


class Question(BaseModel):
    """What both sub-tasks have."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    question: str
    grade: str = ""
    label: str = ""
    skills: tuple[str, ...] = ()


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
        return {"task": "choose_txt", "choices": self.choices, "answer_index": self.answer}


class FillInBlank(Question):
    """One entry of `fill_in_blank`."""

    answer: str = Field(min_length=1)

    def turns(self) -> tuple[str, str]:
        """The paper's template (arXiv 2406.05130, Table 10) and the string to fill in."""
        return f"{self.question} Fill in the blanks in () or answer this question.", self.answer

    def meta(self) -> dict[str, Any]:
        """What the metric needs beside the answer."""
        return {"task": "fill_in_blank"}


AnyQuestion = ChooseText | FillInBlank


def _release(kind: Kind, model: type[AnyQuestion], sizes: tuple[int, int, int]) -> Release:
    """What is published, of one sub-task."""

    def read(files: Files, official: str) -> list[Item]:
        return _read(files, kind, model, official)

    def read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
        return _read_table(rows, kind, model, official)

    return Release(
        title=f"IconQA {kind}",
        paper="Lu et al. 2021, arXiv 2110.13214",
        home="https://iconqa.github.io",
        licence="CC BY-NC-SA 4.0",
        size="0.6 GB",
        folder=f"iconqa/{kind}",
        splits={
            "train": Part("train", sizes[0]),
            "validation": Part("val", sizes[1]),
            "test": Part("test", sizes[2]),
        },
        downloads=(
            Download("iconqa_data.zip", "https://iconqa2021.s3.us-west-1.amazonaws.com/iconqa_data.zip"),
            Download("pid2skills.json", "https://github.com/lupantech/IconQA/tree/main/data (optional: skills)"),
        ),
        read=read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "unseen"},
        hub=Hub("lmms-lab/ICON-QA", {"val": "val", "test": "test"}, _COLUMNS, read_table, image="query_image"),
    )


def _read(files: Files, kind: Kind, model: type[AnyQuestion], official: str) -> list[Item]:
    problems, splits = files.read("problems.json"), files.read("pid_splits.json")
    key = f"{kind}_{official}"
    known = object_of(problems)
    pids = pick_split(object_of(splits), key, known=known, file=Path(splits.place), remedy=_REMEDY)
    skills = object_of(files.read("pid2skills.json")) if files.has("pid2skills.json") else {}
    told = ((pid, known[pid], skills.get(pid, ())) for pid in pids)
    values = ((pid, {**entry, "skills": of} if isinstance(entry, dict) else entry) for pid, entry, of in told)
    questions = check_each(values, model, file=Path(problems.place))
    return [
        Item(pid, question, f"{pid}/image.png", (f"{official}/{kind}/{pid}/image.png",))
        for pid, question in questions.items()
    ]


def _read_table(rows: Sequence[Mapping[str, Any]], kind: Kind, model: type[AnyQuestion], official: str) -> list[Item]:
    """The hub's copy has all sub-tasks in one table, and choices as one text."""
    chosen = [(number, row) for number, row in enumerate(rows) if row.get("ques_type") == kind]
    place = Path(f"iconqa, {official}")
    questions = check_each(((str(row["question_id"]), _fields(row)) for _, row in chosen), model, file=place)
    return [
        Item(key, questions[key], f"{key}/image.png", row=number)
        for number, row in chosen
        for key in [str(row["question_id"])]
    ]


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as problems.json has it: a choice's text may be given instead of its index."""
    choices = row.get("choices") or ()
    if isinstance(choices, str):
        choices = [each.strip() for each in choices.split(",")]
    skills = row.get("skills") or ()
    answer = row.get("answer")
    if choices and not str(answer).isdecimal():
        answer = list(choices).index(answer) if answer in choices else -1
    fields = {
        "question": row.get("question"),
        "answer": answer,
        "skills": [skills] if isinstance(skills, str) else skills,
    }
    if choices:
        fields |= {"choices": choices, "answer": int(str(answer))}
    return fields | {name: str(row.get(name) or "") for name in ("grade", "label")}


class IconQATxt(Task):
    """IconQA's `choose_txt`: choose one of the given texts."""

    Options = IconQAOptions
    metric = "iconqa"
    max_new_tokens = 32  # a choice can be a short sentence, and a cut one equals none of the choices
    prompts = {
        "paper": Prompt(
            "<image>\n{question} Choices: choice 1, choice 2, ... "
            "Choose an option from the choices to answer the question.",
            32,
            "Zhou et al. 2024, Table 10",
        )
    }
    release = _release("choose_txt", ChooseText, (18_946, 6_316, 6_316))

    def __init__(self, options: TaskOptions):
        assert isinstance(options, IconQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions, or those that are drawn, in the order of pid_splits.json or of the ids."""
        return _open("iconqa_txt", self.release, self.options, split, self.record_of, ChooseText)

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        question = ChooseText.model_validate(line.entry)
        return _record(line.id, question, line.image, question.skills, line.source)

    def origin(self, split: Split) -> dict[str, Any]:
        """Its folder's manifest, and the draw."""
        return _origin("iconqa_txt", self.release, self.options, split)


class IconQABlank(Task):
    """IconQA's `fill_in_blank`: answer with a short string."""

    Options = IconQAOptions
    metric = "iconqa"
    prompts = {
        "paper": Prompt(
            "<image>\n{question} Fill in the blanks in () or answer this question.", 16, "Zhou et al. 2024, Table 10"
        )
    }
    release = _release("fill_in_blank", FillInBlank, (10_913, 3_638, 3_638))

    def __init__(self, options: TaskOptions):
        assert isinstance(options, IconQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions, or those that are drawn, in the order of pid_splits.json or of the ids."""
        return _open("iconqa_blank", self.release, self.options, split, self.record_of, FillInBlank)

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        question = FillInBlank.model_validate(line.entry)
        return _record(line.id, question, line.image, question.skills, line.source)

    def origin(self, split: Split) -> dict[str, Any]:
        """Its folder's manifest, and the draw."""
        return _origin("iconqa_blank", self.release, self.options, split)


def _prepared(release: Release, options: IconQAOptions) -> IconQAOptions | None:
    """The options with the prepared folder as root, where there is one: the root, or the sub-task's folder in it."""
    for folder in (options.root, options.root / Path(release.folder).name):
        if is_prepared(folder):
            return options.model_copy(update={"root": folder})
    return None


def _open(
    task: str,
    release: Release,
    options: IconQAOptions,
    split: Split,
    make: Callable[[Line], Record],
    model: type[AnyQuestion],
) -> Sequence[Record]:
    """A split's records from a prepared folder or an official layout."""
    if prepared := _prepared(release, options):
        return open_split(task, release, prepared, split, make)
    found = _find(options.root, Path(release.folder).name, split)
    questions = check_each(((at.pid, at.entry) for at in found), model, file=options.root)
    drawn = choose([at.pid for at in found], options, split)
    return _records(options.root, found if drawn is None else [found[place] for place in drawn.places], questions)


def _origin(task: str, release: Release, options: IconQAOptions, split: Split) -> dict[str, Any]:
    if prepared := _prepared(release, options):
        return origin(task, release, prepared, split)
    found = _find(options.root, Path(release.folder).name, split)
    told = {"official_split": _FOLDER[split], "questions": len(found)}
    drawn = choose([at.pid for at in found], options, split)
    return told if drawn is None else {**told, "sample": dict(drawn.told)}


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
    return [_record(at.pid, questions[at.pid], FileImage(at.image), skills.get(at.pid, ()), at.source) for at in found]


def _skills(root: Path) -> dict[str, tuple[str, ...]]:
    file = root / "pid2skills.json"
    if not file.is_file():
        return {}
    return {pid: tuple(skills) for pid, skills in read_object(file, remedy=_REMEDY).items()}


def _record(pid: str, question: AnyQuestion, image: FileImage | None, skills: tuple[str, ...], source: str) -> Record:
    assert image is not None, "every question has an image"
    ask, answer = question.turns()
    told = {"grade": question.grade, "label": question.label, "skills": skills}
    return Record(
        id=pid,
        turns=(Turn("user", f"{IMAGE_MARK}\n{ask}"), Turn("assistant", answer)),
        images=(image,),
        meta={**question.meta(), **told},
        source=source,
    )
