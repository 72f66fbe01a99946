"""POPE: is an object in the image? 3 x 3,000 questions of yes or no about 500 COCO validation images.

Li et al. 2023 (arXiv 2305.10355); MIT. The absent objects are drawn at random, among the popular ones, or among those
that go with the present ones (`adversarial`). Nothing to train on. LLaVA-1.5 was scored on the older files, whose
random set has 2,910 questions; both are taken. Not one of the study's data sets.

    coco_pope_{random,popular,adversarial}.json   JSON lines {"question_id", "image", "text", "label": "yes" | "no"}
    val2014/COCO_val2014_000000310196.jpg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.record import Record, Turn
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import COCO, COCO_MD5, LLAVA_SHORT, QWEN_SHORT, rows_of

_NAME = "pope"
_SITE = "https://github.com/AoiDragon/POPE/tree/main/output/coco"
_SETS = ("random", "popular", "adversarial")


class POPEEntry(BaseModel):
    """One question."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(min_length=1)
    label: Literal["yes", "no"]
    category: Literal["random", "popular", "adversarial"]


def _read(files: Files, official: str) -> list[Item]:
    return [item for category in _SETS for item in _read_set(files, category)]


def _read_set(files: Files, category: str) -> list[Item]:
    document = files.read(f"coco_pope_{category}.json")
    rows = rows_of(document, needs=("question_id", "image"))
    entries = check_each(
        ((str(row["question_id"]), {**row, "category": category}) for row in rows),
        POPEEntry,
        file=Path(document.place),
    )
    return [
        Item(f"{category}_{row['question_id']}", entries[str(row["question_id"])], name, (f"val2014/{name}", name))
        for row in rows
        for name in [str(row["image"])]
    ]


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    fields = (
        (number, {"text": row.get("question"), "label": str(row.get("answer")).lower(), "category": row["category"]})
        for number, row in enumerate(rows)
    )
    entries = check_each(((str(number), entry) for number, entry in fields), POPEEntry, file=Path(_NAME))
    return [
        Item(f"{row['category']}_{row['question_id']}", entries[str(number)], f"{row['image_source']}.jpg", row=number)
        for number, row in enumerate(rows)
    ]


class POPEOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    prompt: Literal["llava", "qwen-vl"] = "llava"
    """Whose words ask the question."""


class POPE(PreparedTask):
    """POPE's three sets on COCO, together; the metric has a figure for each."""

    name = _NAME
    Options = POPEOptions
    metric = "pope"
    prompts = {"llava": LLAVA_SHORT, "qwen-vl": QWEN_SHORT}
    release = Release(
        title="POPE",
        paper="Li et al. 2023, arXiv 2305.10355",
        home="https://github.com/AoiDragon/POPE",
        licence="MIT; images: COCO's terms (Flickr)",
        size="7 GB, all but 2 MB of it COCO's validation images",
        folder="pope",
        splits={"test": Part("test", 9_000, also=(8_910,), note="8,910 in the files that LLaVA-1.5 was scored on")},
        downloads=(
            *(Download(f"coco_pope_{name}.json", f"{_SITE}/coco_pope_{name}.json") for name in _SETS),
            Download("val2014.zip", f"{COCO}/val2014.zip", COCO_MD5["val"]),
        ),
        read=_read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "unseen"},
        hub=Hub(
            "lmms-lab/POPE",
            {"test": "test"},
            ("question_id", "question", "answer", "category", "image_source"),
            _read_table,
        ),
        samples={},
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        entry = POPEEntry.model_validate(line.entry)
        assert line.image is not None, "every question has an image"
        return Record(
            id=line.id,
            turns=(Turn("user", self._prompt.ask(question=entry.text)), Turn("assistant", entry.label)),
            images=(line.image,),
            meta={"category": entry.category},
            source=line.source,
        )
