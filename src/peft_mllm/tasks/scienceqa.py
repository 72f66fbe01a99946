"""ScienceQA: multiple-choice school science, about half of it with an image.

Lu et al. 2022, "Learn to Explain" (arXiv 2209.09513); CC BY-NC-SA 4.0. The official release, as it is:

    root/problems.json                        {pid: {question, choices, answer, hint, image, subject, ...}}
    root/pid_splits.json                      {"train": [pid, ...], "val": [...], "test": [...]}
    root/images/{train,val,test}/{pid}/image.png

The full sets have 12,726 / 4,241 / 4,241 questions, 2,017 of the test questions with an image ("SQA (img)":
`images_only: true`). The answer to give is the option's letter. A prepared folder is taken as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_mllm.data.images import FileImage
from peft_mllm.data.official import (
    check_each,
    check_images,
    check_index,
    is_safe_name,
    pick_split,
    read_object,
    read_split,
)
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line, is_prepared
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.tasks.base import Prompt, Split, Task, TaskOptions
from peft_mllm.tasks.reading import SampledOptions, choose, open_split, origin
from peft_mllm.tasks.vqa_files import object_of

_NAME = "scienceqa"
_FOLDER: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
_REMEDY = "Download problems.json, pid_splits.json and the images from https://scienceqa.github.io."


class ScienceQAOptions(SampledOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    root: Path
    """Prepared folder, or one with problems.json, pid_splits.json and images/."""
    images_only: bool = False
    """Keep only the questions that have an image."""
    prompt: Literal["paper", "llava", "qwen-vl"] = "paper"
    """Whose words ask the question; the study's have no place for the hint."""


class Problem(BaseModel):
    """What we read of one entry of problems.json."""

    model_config = ConfigDict(frozen=True)

    question: str
    choices: tuple[str, ...] = Field(min_length=2, max_length=26)
    answer: int
    hint: str = ""
    image: str | None = None
    subject: str = ""
    grade: str = ""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Problem:
        check_index(self.answer, self.choices)
        if self.image is not None and not is_safe_name(self.image):
            raise ValueError(f"image {self.image!r} is not a plain file name")
        return self


def _read(files: Files, official: str) -> list[Item]:
    problems, splits = files.read("problems.json"), files.read("pid_splits.json")
    known = object_of(problems)
    pids = pick_split(object_of(splits), official, known=known, file=Path(splits.place), remedy=_REMEDY)
    checked = check_each(((pid, known[pid]) for pid in pids), Problem, file=Path(problems.place))
    return [_item(pid, problem, official) for pid, problem in checked.items()]


def _item(pid: str, problem: Problem, official: str) -> Item:
    if problem.image is None:
        return Item(pid, problem)
    name = f"{pid}/{problem.image}"
    return Item(pid, problem, name, (f"images/{official}/{name}", f"{official}/{name}"))


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    """The hub's copy has no ids: a question's is its place."""
    named = [(f"{official}_{number}", row) for number, row in enumerate(rows)]
    keys = ("question", "choices", "answer", "hint", "subject", "grade")
    checked = check_each(
        ((key, {name: row[name] for name in keys if row.get(name) is not None}) for key, row in named),
        Problem,
        file=Path(f"{_NAME}, {official}"),
    )
    return [
        Item(key, checked[key], f"{key}.png" if row.get("has_image", True) else None, row=number)
        for number, (key, row) in enumerate(named)
    ]


class ScienceQA(Task):
    """ScienceQA as the official release has it."""

    Options = ScienceQAOptions
    metric = "scienceqa"
    prompts = {
        "paper": Prompt("<image>\n{question} A.choice 1, B.choice 2, ...", 16, "Zhou et al. 2024, Table 10"),
        "llava": Prompt(
            "<image>\nContext: {hint}\n{question}\nA. choice 1\nB. choice 2\n"
            "Answer with the option's letter from the given choices directly.",
            16,
            "LLaVA-1.5; the first line is absent where there is no hint",
        ),
        "qwen-vl": Prompt(
            "<image>Context: {hint}\nQuestion: {question}\nOptions: A. choice 1\nB. choice 2\nAnswer:",
            16,
            "Qwen-VL eval_mm, which compares the likelihoods of the letters; N/A where there is no hint",
        ),
    }
    release = Release(
        title="ScienceQA",
        paper="Lu et al. 2022, arXiv 2209.09513",
        home="https://scienceqa.github.io",
        licence="CC BY-NC-SA 4.0",
        size="0.6 GB",
        folder="scienceqa",
        splits={
            "train": Part("train", 12_726),
            "validation": Part("val", 4_241),
            "test": Part("test", 4_241, note="2,017 with an image"),
        },
        downloads=(
            Download("problems.json", "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"),
            Download("pid_splits.json", "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"),
            *(
                Download(f"{name}.zip", "https://scienceqa.github.io (Google Drive)")
                for name in ("train", "val", "test")
            ),
        ),
        read=_read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "unseen"},
        hub=Hub(
            "derek-thomas/ScienceQA",
            {"train": "train", "val": "validation", "test": "test"},
            ("question", "choices", "answer"),
            _read_table,
        ),
    )

    def __init__(self, options: TaskOptions):
        assert isinstance(options, ScienceQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions, or those that are drawn, in the order of pid_splits.json."""
        if is_prepared(self.options.root):
            kept = self.options.images_only
            return open_split(_NAME, self.release, self.options, split, self.record_of, images_only=kept)
        problems = self._problems(split)
        folder = self.options.root / "images" / _FOLDER[split]
        images = {pid: folder / pid / problem.image for pid, problem in problems.items() if problem.image}
        check_images(list(images.values()), root=self.options.root, remedy=_REMEDY)
        records = [self._record(pid, problem, images.get(pid)) for pid, problem in problems.items()]
        drawn = choose(list(problems), self.options, split)
        return records if drawn is None else [records[place] for place in drawn.places]

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        problem = Problem.model_validate(line.entry)
        return _record(line.id, problem, line.image, PROMPTS[self.options.prompt], line.source)

    def origin(self, split: Split) -> dict[str, Any]:
        """Its folder's manifest, and the draw."""
        if is_prepared(self.options.root):
            return origin(_NAME, self.release, self.options, split, images_only=self.options.images_only)
        problems = self._problems(split)
        told = {"official_split": _FOLDER[split], "questions": len(problems)}
        drawn = choose(list(problems), self.options, split)
        return told if drawn is None else {**told, "sample": dict(drawn.told)}

    def _record(self, pid: str, problem: Problem, image: Path | None) -> Record:
        source = f"problems.json[{pid}]"
        return _record(pid, problem, FileImage(image) if image else None, PROMPTS[self.options.prompt], source)

    def _problems(self, split: Split) -> dict[str, Problem]:
        root = self.options.root
        entries = read_object(root / "problems.json", remedy=_REMEDY)
        pids = read_split(root / "pid_splits.json", _FOLDER[split], known=entries, remedy=_REMEDY)
        problems = check_each(((pid, entries[pid]) for pid in pids), Problem, file=root / "problems.json")
        if not self.options.images_only:
            return problems
        return {pid: problem for pid, problem in problems.items() if problem.image}


def paper_prompt(problem: Problem) -> str:
    """`{Q} A.choice 1, B.choice 2`: the paper's template, which has no place for the hint."""
    return f"{problem.question} {', '.join(_lettered(problem, mark='.'))}"


def llava_prompt(problem: Problem) -> str:
    """LLaVA-1.5's: the `Context:` line is absent where there is no hint."""
    context = [f"Context: {problem.hint}"] if problem.hint else []
    request = "Answer with the option's letter from the given choices directly."
    return "\n".join([*context, problem.question, *_lettered(problem, mark=". "), request])


def qwen_prompt(problem: Problem) -> str:
    """Qwen-VL's; it follows its image at once."""
    options = "\n".join(_lettered(problem, mark=". "))
    return f"Context: {problem.hint or 'N/A'}\nQuestion: {problem.question}\nOptions: {options}\nAnswer:"


class _Words(NamedTuple):
    """How a prompt words a question, and what stands between image and text."""

    ask: Callable[[Problem], str]
    after_image: str


PROMPTS: dict[str, _Words] = {
    "paper": _Words(paper_prompt, "\n"),
    "llava": _Words(llava_prompt, "\n"),
    "qwen-vl": _Words(qwen_prompt, ""),
}


def _lettered(problem: Problem, *, mark: str) -> list[str]:
    pairs = zip(ascii_uppercase, problem.choices, strict=False)
    return [f"{letter}{mark}{choice}" for letter, choice in pairs]


def _record(pid: str, problem: Problem, image: FileImage | None, words: _Words, source: str) -> Record:
    text = words.ask(problem)
    return Record(
        id=pid,
        turns=(
            Turn("user", f"{IMAGE_MARK}{words.after_image}{text}" if image else text),
            Turn("assistant", ascii_uppercase[problem.answer]),
        ),
        images=(image,) if image else (),
        meta={
            "choices": problem.choices,
            "answer_index": problem.answer,
            "subject": problem.subject,
            "grade": problem.grade,
            "has_image": image is not None,
            "hint": problem.hint,
        },
        source=source,
    )
