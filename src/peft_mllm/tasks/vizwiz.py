"""VizWiz-VQA: photos that blind people took, and what they asked about them.

Gurari et al. 2018 (arXiv 1802.08218); CC BY 4.0. 20,523 training, 4,319 validation and 8,000 test questions; the
answers of the test set are not public, so the validation set is scored, as in the study. About a third of the answers
are `unanswerable`, which is a string like any other:

    {train,val}.json     [{"image", "question", "answers": [{"answer", ...} x 10], "answer_type", "answerable"}]
    {train,val}/VizWiz_train_00000000.jpg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.tasks.base import Prompt
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import (
    LLAVA,
    PAPER,
    QWEN_SHORT,
    REQUEST,
    VQAEntry,
    answers_of,
    rows_of,
    table_items,
    vqa_record,
)

_NAME = "vizwiz"
_SITE = "https://vizwiz.cs.colorado.edu/VizWiz_final"


def _read(files: Files, official: str) -> list[Item]:
    document = files.read(f"Annotations/{official}.json", f"{official}.json")
    rows = rows_of(document, needs=("image",))
    entries = check_each(((str(row["image"]), _entry(row)) for row in rows), VQAEntry, file=Path(document.place))
    names = [str(row["image"]) for row in rows]
    return [Item(Path(name).stem, entries[name], name, (f"{official}/{name}", name)) for name in names]


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row.get("question"),
        "answers": answers_of(row.get("answers")),
        "answer_type": row.get("answer_type") or "",
    }


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    items = table_items(rows, place=f"{_NAME}, {official}", image="question_id", fields={"answer_type": "category"})
    return [Item(Path(item.id).stem, item.entry, item.image, row=item.row) for item in items]


class VizWizOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    prompt: Literal["paper", "llava", "qwen-vl"] = "paper"
    """Whose words ask the question; the wording alone moves the score by tens of points."""


class VizWiz(PreparedTask):
    """VizWiz-VQA, scored on its validation set."""

    name = _NAME
    Options = VizWizOptions
    metric = "vqa:vizwiz"
    prompts = {
        "paper": Prompt(
            f'{IMAGE_MARK}\nQuestion: {{question}} When the information is insufficient, respond with "Unanswerable". '
            f"{REQUEST}",
            32,
            PAPER,
        ),
        "llava": Prompt(
            f"{IMAGE_MARK}\n{{question}}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            f"{REQUEST}",
            128,
            LLAVA,
        ),
        "qwen-vl": QWEN_SHORT,
    }
    release = Release(
        title="VizWiz-VQA",
        paper="Gurari et al. 2018, arXiv 1802.08218",
        home="https://vizwiz.org/tasks-and-datasets/vqa/",
        licence="CC BY 4.0",
        size="about 13 GB; the validation images 2 GB",
        folder="vizwiz",
        splits={
            "train": Part("train", 20_523),
            "test": Part("val", 4_319, note="the answers of the test set are not public"),
        },
        downloads=(
            Download("Annotations.zip", f"{_SITE}/vqa_data/Annotations.zip"),
            Download("train.zip", f"{_SITE}/images/train.zip"),
            Download("val.zip", f"{_SITE}/images/val.zip"),
        ),
        read=_read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "unseen"},
        hub=Hub("lmms-lab/VizWiz-VQA", {"val": "val"}, ("question_id", "question", "answers"), _read_table),
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it; the answer to learn is the one that most people gave."""
        entry = VQAEntry.model_validate(line.entry)
        return vqa_record(line, entry, self._prompt.ask(question=entry.question))
