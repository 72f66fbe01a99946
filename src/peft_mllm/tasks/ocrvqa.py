"""OCR-VQA: questions about the covers of books, most of them answered by reading.

Mishra et al. 2019, "OCR-VQA: Visual Question Answering by Reading Text in Images" (ICDAR). 207,572 books with about
a million questions. The owners publish questions and the addresses of the images; whoever downloads them saves each
as `images/{asin}` with the address's ending, or all as `.jpg`; both are found. Some addresses no longer answer:
`--partial` leaves those books out, and every result says how many. The study trains on 20,000 questions and scores
5,000, drawn at random; ours are drawn by `sample_seed` and recorded.

    dataset.json   {asin: {"imageURL", "questions": [...], "answers": [...], "split": 1 | 2 | 3}}  train, val, test
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.record import Record, Turn
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import LLAVA_SHORT, PAPER_SHORT, QWEN_SHORT, object_of

_NAME = "ocrvqa"
_SPLITS = {"train": 1, "val": 2, "test": 3}
_ENDINGS = (".jpg", ".png", ".gif", ".jpeg")


class Book(BaseModel):
    """One entry of dataset.json."""

    model_config = ConfigDict(frozen=True)

    imageURL: str = ""  # noqa: N815 - the release's own spelling
    questions: tuple[Annotated[str, Field(min_length=1)], ...]
    answers: tuple[str, ...]
    split: Literal[1, 2, 3] = 1
    title: str = ""
    genre: str = ""

    @model_validator(mode="after")
    def _an_answer_each(self) -> Book:
        if len(self.questions) != len(self.answers):
            raise ValueError(f"it has {len(self.questions)} questions and {len(self.answers)} answers")
        return self


class OCRVQAEntry(BaseModel):
    """One question about a book."""

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    answer: str
    asin: str
    title: str = ""
    genre: str = ""


def _read(files: Files, official: str) -> list[Item]:
    document = files.read("dataset.json")
    books = check_each(object_of(document).items(), Book, file=Path(document.place))
    wanted = _SPLITS[official]
    return [item for asin, book in books.items() if book.split == wanted for item in _items(asin, book, files)]


def _items(asin: str, book: Book, files: Files) -> list[Item]:
    """A book's questions, which share its cover."""
    ending = PurePosixPath(urlparse(book.imageURL).path).suffix.lower() or ".jpg"
    endings = dict.fromkeys((ending, *_ENDINGS))
    there = next((each for each in endings if files.holds(f"images/{asin}{each}")), ending)
    find = (f"images/{asin}{there}", *(f"{asin}{each}" for each in endings))
    return _questions(asin, book, image=f"{asin}{there}", find=find, row=None)


def _questions(asin: str, book: Book, *, image: str, find: tuple[str, ...], row: int | None) -> list[Item]:
    return [
        Item(
            f"{asin}_{number}",
            OCRVQAEntry(question=question, answer=answer, asin=asin, title=book.title, genre=book.genre),
            image,
            find,
            row,
        )
        for number, (question, answer) in enumerate(zip(book.questions, book.answers, strict=True))
    ]


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    books = check_each(
        (
            (str(number), {key: row.get(key) or "" for key in ("title", "genre")} | _pairs(row))
            for number, row in enumerate(rows)
        ),
        Book,
        file=Path(f"{_NAME}, {official}"),
    )
    return [
        item
        for number, row in enumerate(rows)
        for asin in [str(row["image_id"])]
        for item in _questions(asin, books[str(number)], image=f"{asin}.jpg", find=(), row=number)
    ]


def _pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"questions": row.get("questions"), "answers": row.get("answers")}


def _count_books(items: Sequence[Item]) -> int:
    return len({item.image for item in items})


class OCRVQAOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a question is asked."""

    train_size: int | None = Field(default=20000, ge=1)
    """Train on this many questions, drawn at random (the study's number); none is all."""
    test_size: int | None = Field(default=5000, ge=1)
    """Score this many questions, drawn at random (the study's number); none is all."""
    prompt: Literal["paper", "llava", "qwen-vl"] = "paper"
    """Whose words ask the question."""


class OCRVQA(PreparedTask):
    """OCR-VQA by the split of its release."""

    name = _NAME
    Options = OCRVQAOptions
    metric = "ocrvqa"
    prompts = {
        "paper": PAPER_SHORT._replace(max_new_tokens=100),  # a title can be long
        "llava": LLAVA_SHORT,
        "qwen-vl": QWEN_SHORT._replace(max_new_tokens=100),
    }
    release = Release(
        title="OCR-VQA",
        paper="Mishra et al. 2019, ICDAR",
        home="https://ocr-vqa.github.io",
        licence="not stated by its owners; images: Amazon",
        size="dataset.json, and about 200,000 images by their addresses (2.3 GB on the hub)",
        folder="ocrvqa",
        splits={
            "train": Part("train", None, unit="books", note="207,572 books in all; 166,022 in the hub's copy"),
            "validation": Part("val", None, unit="books", note="20,731 in the hub's copy"),
            "test": Part("test", None, unit="books", note="20,796 in the hub's copy"),
        },
        downloads=(
            Download("dataset.json", "https://ocr-vqa.github.io"),
            Download("images/", "https://ocr-vqa.github.io (its loadDataset.py fetches them)"),
        ),
        read=_read,
        seen={"llava-1.5": "seen", "sharegpt4v": "seen", "qwen-vl-chat": "seen"},
        hub=Hub(
            "howard-hou/OCR-VQA",
            {"train": "train", "val": "validation", "test": "test"},
            ("image_id", "questions", "answers"),
            _read_table,
        ),
        samples={"train": (1000, 5000, 10000, 20000), "test": (5000,)},
        count=_count_books,
    )

    def record_of(self, line: Line) -> Record:
        """The question as the prompt asks it."""
        entry = OCRVQAEntry.model_validate(line.entry)
        assert line.image is not None, "every question has an image"
        return Record(
            id=line.id,
            turns=(Turn("user", self._prompt.ask(question=entry.question)), Turn("assistant", entry.answer)),
            images=(line.image,),
            meta={"asin": entry.asin, "genre": entry.genre},
            source=line.source,
        )
