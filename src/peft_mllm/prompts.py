"""Questions as a model will read them: their hashes, their text, and which are asked together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from peft_mllm.data.encode import Sample
from peft_mllm.files import canonical_json
from peft_mllm.record import Record

LONG_RUN = 4
"""So many equal tokens in a row are an image's placeholders, and are shown as one with their number."""


@dataclass(frozen=True)
class Prompt:
    """One question as a model reads it.

    Attributes:
        text: with the model's own template; an image's placeholders stand as one, `<image>x576`.
        sha256: of its tokens and images.
        question_sha256: of what was asked, whatever the model: words, images, choices and reference.
        images: the keys of its images.
        length: in tokens.
    """

    text: str
    sha256: str
    question_sha256: str
    images: tuple[str, ...]
    length: int


def prompt_of(record: Record, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a record; `sample` is the record encoded without its answer."""
    images = tuple(image.key for image in record.images)
    said = [[turn.role, turn.text] for turn in record.turns]
    question = [said, images, [str(choice) for choice in record.meta.get("choices", ())]]
    return Prompt(
        text="".join(_pieces(sample.ids, tokenizer)),
        sha256=_digest([sample.ids, images]),
        question_sha256=_digest(question),
        images=images,
        length=len(sample.ids),
    )


def together(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Which questions make a batch: those of one image stay together, and like lengths come together.

    A function of the prompts and the size alone: the batches are the same for any number of processes.

    Args:
        prompts: of all questions.
        size: questions of a batch, at most.
    """
    groups: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.images or i, []).append(i)
    pieces = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
    pieces.sort(key=lambda piece: max(prompts[i].length for i in piece))
    batches: list[list[int]] = []
    for piece in pieces:
        if batches and len(batches[-1]) + len(piece) <= size:
            batches[-1] += piece
        else:
            batches.append(piece)
    return batches


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    plain: list[int] = []
    for token, run in groupby(ids):
        count = len(list(run))
        if count < LONG_RUN:
            plain += [token] * count
            continue
        yield tokenizer.decode(plain)
        yield f"{tokenizer.decode([token])}x{count}"
        plain = []
    yield tokenizer.decode(plain)


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
