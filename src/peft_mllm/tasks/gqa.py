"""GQA: questions made from scene graphs, which ask for several steps of reasoning.

Hudson and Manning 2019 (arXiv 1902.09506); the balanced questions: 943,000 for training, 132,062 for validation, and
12,578 of test-dev, which are scored, as everywhere. Not one of the study's data sets; LLaVA-1.5 was trained on it.

    {train,val,testdev}_balanced_questions.json   {id: {"question", "imageId", "answer", "types", ...}}
    images/{imageId}.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Download, Files, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.record import Record, Turn
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import LLAVA_SHORT, QWEN_SHORT, object_of

_SITE = "https://downloads.cs.stanford.edu/nlp/data/gqa"


class GQAEntry(BaseModel):
    """What we read of one question."""

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    imageId: str = Field(pattern=r"^\w+$")  # noqa: N815 - the release's own spelling
    types: dict[str, str | None] = {}


def _read(files: Files, official: str) -> list[Item]:
    document = files.read(f"{official}_questions.json")
    entries = check_each(object_of(document).items(), GQAEntry, file=Path(document.place))
    return [
        Item(key, entry, name, (f"images/{name}", name))
        for key, entry in entries.items()
        for name in [f"{entry.imageId}.jpg"]
    ]


class GQAOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    prompt: Literal["llava", "qwen-vl"] = "llava"
    """Whose words ask the question."""


class GQA(PreparedTask):
    """GQA's balanced questions, scored on test-dev."""

    name = "gqa"
    Options = GQAOptions
    metric = "gqa:llava"
    prompts = {"llava": LLAVA_SHORT, "qwen-vl": QWEN_SHORT}
    release = Release(
        title="GQA",
        paper="Hudson and Manning 2019, arXiv 1902.09506",
        home="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        licence="CC BY 4.0; images: Visual Genome",
        size="about 22 GB",
        folder="gqa",
        splits={
            "train": Part("train_balanced", 943_000),
            "validation": Part("val_balanced", 132_062),
            "test": Part("testdev_balanced", 12_578, note="the answers of the test set are not public"),
        },
        downloads=(
            Download("questions1.2.zip", f"{_SITE}/questions1.2.zip"),
            Download("images.zip", f"{_SITE}/images.zip"),
        ),
        read=_read,
        seen={"llava-1.5": "seen", "sharegpt4v": "seen", "qwen-vl-chat": "seen"},
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        entry = GQAEntry.model_validate(line.entry)
        assert line.image is not None, "every question has an image"
        return Record(
            id=line.id,
            turns=(Turn("user", self._prompt.ask(question=entry.question)), Turn("assistant", entry.answer)),
            images=(line.image,),
            meta={"types": {name: value for name, value in entry.types.items() if value}},
            source=line.source,
        )
