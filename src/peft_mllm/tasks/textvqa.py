"""TextVQA: questions whose answers are written in the image.

Singh et al. 2019 (arXiv 1904.08920); CC BY 4.0. 34,602 training and 5,000 validation questions; the validation set
is scored, as everywhere. Not one of the study's data sets. LLaVA's prompt names the words that a reader of text found
in the image, which raises scores by much; they are read where `TextVQA_Rosetta_OCR_v0.2_{train,val}.json` lies in the
source, and `prompt: llava` needs them.

    TextVQA_0.5.1_{train,val}.json   {"data": [{"question_id", "question", "image_id", "answers": [text x 10]}]}
    train_images/{image_id}.jpg      of both splits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.tasks.base import Prompt
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import (
    LLAVA,
    QWEN_SHORT,
    REQUEST,
    VQAEntry,
    answers_of,
    rows_of,
    table_items,
    vqa_record,
)

_NAME = "textvqa"
_SITE = "https://dl.fbaipublicfiles.com/textvqa"


class TextVQAEntry(VQAEntry):
    """A question with its answers and, where they were given, the words found in the image."""

    ocr_tokens: tuple[str, ...] | None = None


def _read(files: Files, official: str) -> list[Item]:
    document = files.read(f"TextVQA_0.5.1_{official}.json")
    rows = rows_of(document, "data", needs=("question_id", "image_id"))
    ocr = f"TextVQA_Rosetta_OCR_v0.2_{official}.json"
    words = {}
    if files.has(ocr):
        words = {
            row.get("image_id"): row.get("ocr_tokens") for row in rows_of(files.read(ocr), "data", needs=("image_id",))
        }
    entries = check_each(
        ((str(row["question_id"]), _entry(row, words.get(row["image_id"]))) for row in rows),
        TextVQAEntry,
        file=Path(document.place),
    )
    return [
        Item(key, entries[key], name, (f"train_images/{name}", f"train_val_images/{name}", name))
        for row in rows
        for key, name in [(str(row["question_id"]), f"{row['image_id']}.jpg")]
    ]


def _entry(row: Mapping[str, Any], words: Any) -> dict[str, Any]:
    return {"question": row.get("question"), "answers": answers_of(row.get("answers")), "ocr_tokens": words}


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    return table_items(rows, place=f"{_NAME}, {official}", image="image_id", fields={})


class TextVQAOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    prompt: Literal["no-ocr", "llava", "qwen-vl"] = "no-ocr"
    """`no-ocr`: LLaVA's without the words found in the image; `llava`: with them, if the source had them."""


class TextVQA(PreparedTask):
    """TextVQA, scored on its validation set."""

    name = _NAME
    Options = TextVQAOptions
    metric = "vqa:m4c"
    prompts = {
        "no-ocr": Prompt(f"{IMAGE_MARK}\n{{question}}\n{REQUEST}", 128, "LLaVA-1.5's, without its words; lmms-eval"),
        "llava": Prompt(f"{IMAGE_MARK}\n{{question}}\nReference OCR token: {{words}}\n{REQUEST}", 128, LLAVA),
        "qwen-vl": QWEN_SHORT,
    }
    release = Release(
        title="TextVQA",
        paper="Singh et al. 2019, arXiv 1904.08920",
        home="https://textvqa.org/dataset/",
        licence="CC BY 4.0; images: OpenImages, CC BY 2.0",
        size="about 7 GB",
        folder="textvqa",
        splits={
            "train": Part("train", 34_602),
            "test": Part("val", 5_000, note="the answers of the test set are not public"),
        },
        downloads=(
            Download("TextVQA_0.5.1_train.json", f"{_SITE}/data/TextVQA_0.5.1_train.json"),
            Download("TextVQA_0.5.1_val.json", f"{_SITE}/data/TextVQA_0.5.1_val.json"),
            Download("train_val_images.zip", f"{_SITE}/images/train_val_images.zip"),
            Download("TextVQA_Rosetta_OCR_v0.2_train.json", f"{_SITE}/data/TextVQA_Rosetta_OCR_v0.2_train.json"),
            Download("TextVQA_Rosetta_OCR_v0.2_val.json", f"{_SITE}/data/TextVQA_Rosetta_OCR_v0.2_val.json"),
        ),
        read=_read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "seen"},
        hub=Hub(
            "lmms-lab/textvqa",
            {"train": "train", "val": "validation"},
            ("question_id", "image_id", "question", "answers"),
            _read_table,
        ),
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it; the answer to learn is the one that most people gave.

        Raises:
            DataError: the prompt names the words in the image, and the source had none.
        """
        entry = TextVQAEntry.model_validate(line.entry)
        if self.options.prompt == "llava" and entry.ocr_tokens is None:
            raise DataError(
                f"{line.source}: has no words found in the image, which `prompt: llava` names. Prepare textvqa with "
                "TextVQA_Rosetta_OCR_v0.2_*.json in the source, or use another prompt."
            )
        return vqa_record(
            line, entry, self._prompt.ask(question=entry.question, words=", ".join(entry.ocr_tokens or ()))
        )
