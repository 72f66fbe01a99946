"""OK-VQA: questions about COCO images that need knowledge from outside the image.

Marino et al. 2019 (arXiv 1906.00067). 9,009 training and 5,046 validation questions; the validation set is the test
set. Each of the ten annotations has two strings: `raw_answer`, as written ("racing"), and `answer`, stemmed ("race").
Official scoring reads `answer`, so a model that writes "racing" is wrong by it; the option `answers` says which of
the two is learned and scored, and figures by one are not comparable with figures by the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from peft_mllm.data.prepare.release import Download, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.errors import DataError
from peft_mllm.record import Record
from peft_mllm.tasks.base import Split
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

_NAME = "okvqa"
_SITE = "https://okvqa.allenai.org/static/data"


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    fields = {"answer_type": "answer_type", "question_type": "question_type"}
    return table_items(rows, place=f"{_NAME}, {official}", image="question_id", fields=fields)


class OKVQAOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    prompt: Literal["paper", "llava", "qwen-vl"] = "paper"
    """Whose words ask the question."""
    answers: Literal["stemmed", "raw"] = "stemmed"
    """`stemmed` as official scoring has them, or `raw` as people wrote them; learned and scored alike."""


class OKVQA(PreparedTask):
    """OK-VQA, scored on its validation set, which is its test set."""

    name = _NAME
    Options = OKVQAOptions
    options: OKVQAOptions
    metric = "vqa"
    prompts = {"paper": PAPER_SHORT, "llava": LLAVA_SHORT, "qwen-vl": QWEN_SHORT}
    release = Release(
        title="OK-VQA",
        paper="Marino et al. 2019, arXiv 1906.00067",
        home="https://okvqa.allenai.org/download.html",
        licence="questions: not stated by their owners; images: COCO's terms (Flickr)",
        size="20 GB, all but 10 MB of it COCO's images",
        folder="okvqa",
        splits={"train": Part("train", 9_009), "test": Part("val", 5_046, note="the validation set is the test set")},
        downloads=(
            *(
                Download(f"{kind}_{split}2014_{what}.json.zip", f"{_SITE}/{kind}_{split}2014_{what}.json.zip")
                for split in ("train", "val")
                for kind, what in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations"))
            ),
            Download("train2014.zip", f"{COCO}/train2014.zip", COCO_MD5["train"]),
            Download("val2014.zip", f"{COCO}/val2014.zip", COCO_MD5["val"]),
        ),
        read=read_coco,
        seen={"llava-1.5": "seen", "sharegpt4v": "seen", "qwen-vl-chat": "seen"},
        hub=Hub("lmms-lab/OK-VQA", {"val": "val2014"}, ("question_id", "question", "answers"), _read_table),
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it; the answer to learn is the one that most people gave.

        Raises:
            DataError: raw answers are asked for, and the release's copy has none.
        """
        entry = VQAEntry.model_validate(line.entry)
        if self.options.answers == "raw":
            if not entry.raw_answers:
                raise DataError(f"{line.source}: has no raw answers. Prepare okvqa from the official annotations.")
            entry = entry.model_copy(update={"answers": entry.raw_answers, "best": ""})
        return vqa_record(line, entry, self._prompt.ask(question=entry.question))

    def origin(self, split: Split) -> dict[str, Any]:
        """Its folder's manifest, the draw, and which answers."""
        return {**super().origin(split), "answers": self.options.answers}
