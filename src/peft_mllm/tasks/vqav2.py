"""VQAv2: open questions about COCO images, each answered by ten people.

Goyal et al. 2017, "Making the V in VQA Matter" (arXiv 1612.00837); annotations CC BY 4.0. 443,757 training and
214,354 validation questions; the answers of the test set are not public, so the validation set is scored. The study
trains on 20,000 questions and scores 5,000, drawn at random; which ones was not published, so ours are drawn by
`sample_seed` and recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from peft_mllm.data.prepare.release import Download, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.record import Record
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import (
    COCO,
    COCO_MD5,
    LLAVA_SHORT,
    PAPER_SHORT,
    QWEN_SHORT,
    VQAEntry,
    read_coco,
    table_items,
    vqa_record,
)

_NAME = "vqav2"
_S3 = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    fields = {"best": "multiple_choice_answer", "answer_type": "answer_type", "question_type": "question_type"}
    return table_items(rows, place=f"{_NAME}, {official}", image="image_id", fields=fields)


class VQAv2Options(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    train_size: int | None = Field(default=20000, ge=1)
    """Train on this many questions, drawn at random (the study's number); none is all."""
    test_size: int | None = Field(default=5000, ge=1)
    """Score this many questions, drawn at random (the study's number); none is all."""
    prompt: Literal["paper", "llava", "qwen-vl"] = "paper"
    """Whose words ask the question."""


class VQAv2(PreparedTask):
    """VQAv2, scored on its validation set."""

    name = _NAME
    Options = VQAv2Options
    metric = "vqa"
    prompts = {"paper": PAPER_SHORT, "llava": LLAVA_SHORT, "qwen-vl": QWEN_SHORT}
    release = Release(
        title="VQAv2",
        paper="Goyal et al. 2017, arXiv 1612.00837",
        home="https://visualqa.org/download.html",
        licence="annotations CC BY 4.0; images: COCO's terms (Flickr)",
        size="20 GB",
        folder="vqav2",
        splits={
            "train": Part("train", 443_757),
            "test": Part("val", 214_354, note="the answers of the test set are not public"),
        },
        downloads=(
            Download("v2_Questions_Train_mscoco.zip", f"{_S3}/v2_Questions_Train_mscoco.zip"),
            Download("v2_Questions_Val_mscoco.zip", f"{_S3}/v2_Questions_Val_mscoco.zip"),
            Download("v2_Annotations_Train_mscoco.zip", f"{_S3}/v2_Annotations_Train_mscoco.zip"),
            Download("v2_Annotations_Val_mscoco.zip", f"{_S3}/v2_Annotations_Val_mscoco.zip"),
            Download("train2014.zip", f"{COCO}/train2014.zip", COCO_MD5["train"]),
            Download("val2014.zip", f"{COCO}/val2014.zip", COCO_MD5["val"]),
        ),
        read=partial(read_coco, version="v2_"),
        seen={"llava-1.5": "seen", "sharegpt4v": "seen", "qwen-vl-chat": "seen"},
        hub=Hub(
            "lmms-lab/VQAv2", {"val": "validation"}, ("question_id", "image_id", "question", "answers"), _read_table
        ),
        samples={"train": (1000, 5000, 10000, 20000), "test": (5000,)},
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it; the answer to learn is the release's `multiple_choice_answer`."""
        entry = VQAEntry.model_validate(line.entry)
        return vqa_record(line, entry, self._prompt.ask(question=entry.question))
