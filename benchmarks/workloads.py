"""The data of each workload, generated: numbers and lengths of the public data sets, noise for images."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Example = dict[str, Any]
"""`messages` and `images`, as in the user's own JSONL."""


@dataclass(frozen=True)
class Workload:
    """What one step trains on.

    Attributes:
        name: on the command line and in the JSON.
        title: in tables.
        images: distinct images of a step.
        questions: about each image.
        question: least and most words of a question.
        answer: least and most words of an answer.
        text_only: further samples of a step without any image.
        task: end of each question; the format that the data set's prompt asks for.
    """

    name: str
    title: str
    images: int
    questions: int
    question: tuple[int, int]
    answer: tuple[int, int]
    text_only: int = 0
    task: str = ""

    def times(self, factor: int) -> Workload:
        """The same with steps so many times larger, for a device that is only busy with more."""
        return replace(self, images=factor * self.images, text_only=factor * self.text_only)

    @property
    def step(self) -> int:
        """Samples of a step."""
        return self.images * self.questions + self.text_only


SHORT = " in one word"
WORKLOADS = {
    each.name: each
    for each in (
        Workload("shared", "five questions per image", 1, 5, (9, 15), (1, 4), task=SHORT),
        Workload("captions", "five captions per image", 1, 5, (1, 1), (8, 14)),
        Workload("single", "one question per image", 2, 1, (11, 17), (1, 4), task=SHORT),
        Workload("mixed", "half text-only, mixed lengths", 2, 1, (20, 140), (40, 420), text_only=2),
    )
}


def write_data(
    workload: Workload, folder: Path, words: Sequence[str], *, image_size: int, steps: int = 1, seed: int = 0
) -> Path:
    """Write `steps` steps of a workload as messages JSONL with its images below; returns the file."""
    rng = random.Random(f"{workload.name} {seed}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(steps):
        for number in range(workload.images):
            name = f"images/{step}-{number}.png"
            _noise(rng, image_size).save(folder / name)
            lines += [_example(workload, rng, words, name) for _ in range(workload.questions)]
        lines += [_example(workload, rng, words, None) for _ in range(workload.text_only)]
    file = folder / f"{workload.name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def read_data(file: Path) -> list[Example]:
    """The lines of a file of ours, with images as paths that can be opened from anywhere."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line | {"images": [str(file.parent / name) for name in line["images"]]} for line in lines]


def merged(file: Path) -> Path:
    """The same data with all questions about an image as turns of one conversation, which is LLaVA's own recipe.

    Later questions then see the earlier ones and their answers: it is another training, with fewer tokens.
    """
    by_image: dict[str, list[Example]] = {}
    for line in (json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()):
        by_image.setdefault(line["images"][0], []).append(line)
    lines = []
    for image, examples in by_image.items():
        turns = [dict(turn) for example in examples for turn in example["messages"]]
        for turn in turns[1:]:
            turn["content"] = turn["content"].removeprefix("<image>\n")
        lines.append({"messages": turns, "images": [image]})
    target = file.with_name(f"{file.stem}-merged.jsonl")
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return target


def words_of(tokenizer: Any) -> list[str]:
    """Words of the tokenizer that are one token each, so that lengths in words are lengths in tokens."""
    starts = "\u0120\u2581"  # how byte-level and SentencePiece vocabularies mark a space before a word
    known = sorted(token[1:] for token in tokenizer.get_vocab() if token[:1] in starts)
    return [word for word in known if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()]


def _example(workload: Workload, rng: random.Random, words: Sequence[str], image: str | None) -> Example:
    question = " ".join(rng.choices(words, k=rng.randint(*workload.question))) + workload.task
    answer = " ".join(rng.choices(words, k=rng.randint(*workload.answer)))
    mark = "<image>\n" if image else ""
    turns = [{"role": "user", "content": mark + question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [image] if image else []}


def _noise(rng: random.Random, size: int) -> Any:
    """A square image somewhat larger than the model takes, smooth enough to look like a photograph's spectrum."""
    from PIL import Image

    small = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size * 4 // 3, size * 4 // 3), Image.Resampling.BICUBIC)
