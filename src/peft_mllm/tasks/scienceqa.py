"""ScienceQA: multiple-choice school science, about half of it with an image.

Lu et al. 2022, "Learn to Explain" (arXiv 2209.09513); CC BY-NC-SA 4.0. The official release, as it is:

    root/problems.json                        {pid: {question, choices, answer, hint, image, subject, ...}}
    root/pid_splits.json                      {"train": [pid, ...], "val": [...], "test": [...]}
    root/images/{train,val,test}/{pid}/image.png

The full sets have 12,726 / 4,241 / 4,241 questions, 2,017 of the test questions with an image ("SQA (img)":
`images_only: true`). The answer to give is the option's letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_mllm.data.images import FileImage
from peft_mllm.data.official import (
    check_each,
    check_images,
    check_index,
    is_safe_name,
    read_object,
    read_split,
)
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.tasks.base import Split, Task, TaskOptions

_FOLDER: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
_REMEDY = "Download problems.json, pid_splits.json and the images from https://scienceqa.github.io."


class ScienceQAOptions(TaskOptions):
    """Where the data is, and how a question is asked."""

    root: Path = Field(description="folder with problems.json, pid_splits.json and images/")
    images_only: bool = Field(False, description="keep only the questions that have an image")
    prompt: Literal["paper", "llava"] = Field(
        "paper",
        description="paper: question and options on one line, without the hint (arXiv 2406.05130, Table 10); "
        "llava: hint, question, one option a line, and the request for a letter (LLaVA-1.5)",
    )


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


class ScienceQA(Task):
    """ScienceQA as the official release has it."""

    Options = ScienceQAOptions
    metric = "scienceqa"

    def __init__(self, options: TaskOptions):
        assert isinstance(options, ScienceQAOptions)
        self.options = options

    def records(self, split: Split) -> Sequence[Record]:
        """The split's questions in the order of pid_splits.json."""
        problems = self._problems(split)
        if self.options.images_only:
            problems = {pid: problem for pid, problem in problems.items() if problem.image}
        folder = self.options.root / "images" / _FOLDER[split]
        images = {pid: folder / pid / problem.image for pid, problem in problems.items() if problem.image}
        check_images(list(images.values()), root=self.options.root, remedy=_REMEDY)
        ask = PROMPTS[self.options.prompt]
        return [_record(pid, problem, images.get(pid), ask) for pid, problem in problems.items()]

    def _problems(self, split: Split) -> dict[str, Problem]:
        root = self.options.root
        entries = read_object(root / "problems.json", remedy=_REMEDY)
        pids = read_split(root / "pid_splits.json", _FOLDER[split], known=entries, remedy=_REMEDY)
        return check_each(((pid, entries[pid]) for pid in pids), Problem, file=root / "problems.json")


def paper_prompt(problem: Problem) -> str:
    """`{Q} A.choice 1, B.choice 2`: the paper's template, which has no place for the hint."""
    return f"{problem.question} {', '.join(_lettered(problem, mark='.'))}"


def llava_prompt(problem: Problem) -> str:
    """LLaVA-1.5's: the `Context:` line is absent where there is no hint."""
    context = [f"Context: {problem.hint}"] if problem.hint else []
    request = "Answer with the option's letter from the given choices directly."
    return "\n".join([*context, problem.question, *_lettered(problem, mark=". "), request])


PROMPTS: dict[str, Callable[[Problem], str]] = {"paper": paper_prompt, "llava": llava_prompt}


def _lettered(problem: Problem, *, mark: str) -> list[str]:
    pairs = zip(ascii_uppercase, problem.choices, strict=False)
    return [f"{letter}{mark}{choice}" for letter, choice in pairs]


def _record(pid: str, problem: Problem, image: Path | None, ask: Callable[[Problem], str]) -> Record:
    text = ask(problem)
    return Record(
        id=pid,
        turns=(
            Turn("user", f"{IMAGE_MARK}\n{text}" if image else text),
            Turn("assistant", ascii_uppercase[problem.answer]),
        ),
        images=(FileImage(image),) if image else (),
        meta={
            "choices": problem.choices,
            "answer_index": problem.answer,
            "subject": problem.subject,
            "grade": problem.grade,
            "has_image": image is not None,
            "hint": problem.hint,
        },
        source=f"problems.json[{pid}]",
    )
