"""What a prepared split is written as: its questions, conversations for other programs, and recorded samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_mllm.data.images import FileImage
from peft_mllm.data.prepare.release import Item
from peft_mllm.files import atomic_write_pieces, write_json
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.seeds import derive

SEED = 42
"""Of the recorded samples, as of the study's runs."""
RULE = "the ids whose SHA-256 with seed and split is least; a smaller sample is part of a larger one"


def write_questions(path: Path, items: Iterable[Item], official: str) -> None:
    """The split's questions, one line each."""
    atomic_write_pieces(path, (_line(_question(item, official)) for item in items), what="the questions")


def write_llava(path: Path, records: Iterable[Record]) -> None:
    """LLaVA JSON: `{"id", "image", "conversations": [{"from": "human", "value"}, ...]}`."""
    atomic_write_pieces(path, _listed(_llava(record) for record in records), what="the conversations")


def write_qwen(path: Path, records: Iterable[Record]) -> None:
    """Qwen-VL JSON: images inside the text, `Picture 1: <img>path</img>`."""
    atomic_write_pieces(path, _listed(_qwen(record) for record in records), what="the conversations")


def write_sample(path: Path, ids: Sequence[str], *, split: str, size: int) -> None:
    """The ids of a random sample, in the order of the split."""
    chosen = sample(ids, size, seed=SEED, split=split)
    path.parent.mkdir(exist_ok=True)
    value = {"split": split, "of": len(ids), "size": size, "seed": SEED, "rule": RULE}
    write_json(path, value | {"ids": [ids[number] for number in chosen]}, what="the sample")


def sample(ids: Sequence[str], size: int, *, seed: int, split: str) -> list[int]:
    """The places of a random sample: a function of seed, split and ids, whatever their order.

    Args:
        ids: of all.
        size: how many; all where there are fewer.
        seed: another draws another sample.
        split: ours, such as `train`.
    """
    drawn = sorted(range(len(ids)), key=lambda number: (derive(seed, "sample", split, ids[number]), ids[number]))
    return sorted(drawn[:size])


def _question(item: Item, official: str) -> dict[str, Any]:
    image = None if item.image is None else f"{official}/{item.image}"
    return {"id": item.id, "image": image, "entry": item.entry.model_dump(mode="json", exclude_defaults=True)}


def _llava(record: Record) -> dict[str, Any]:
    said = [
        {"from": "human" if turn.role == "user" else "gpt", "value": turn.text}
        for turn in record.turns
        if turn.role != "system"
    ]
    image = {"image": _path(record)} if record.images else {}
    return {"id": record.id, **image, "conversations": said}


def _qwen(record: Record) -> dict[str, Any]:
    said = []
    for turn in record.turns:
        text = turn.text
        if IMAGE_MARK in text:
            mark = f"{IMAGE_MARK}\n" if f"{IMAGE_MARK}\n" in text else IMAGE_MARK
            text = text.replace(mark, f"Picture 1: <img>{_path(record)}</img>\n")
        said.append({"from": turn.role, "value": text})
    return {"id": record.id, "conversations": said}


def _path(record: Record) -> str:
    """The image's path below the prepared folder, which is what a prepared image is called."""
    (image,) = record.images
    assert isinstance(image, FileImage), "a prepared record's image is a file"
    return image.name


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _listed(values: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """A JSON list with one entry a line, written as it comes."""
    lead = b"[\n"
    for value in values:
        yield lead + _line(value).rstrip(b"\n")
        lead = b",\n"
    yield b"[]\n" if lead == b"[\n" else b"\n]\n"
