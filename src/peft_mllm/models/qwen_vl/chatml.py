r"""ChatML as Qwen-VL was trained on it: the token ids of a conversation, and what of them is learned.

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n

Header, text and end of a turn are tokenised apart, as in training; so no label needs an offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.errors import DataError
from peft_mllm.models.base import Labels, check_marks
from peft_mllm.record import IMAGE_MARK, Record, Turn

if TYPE_CHECKING:
    from peft_mllm.models.qwen_vl.tokenizer import QWenTokenizer

SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0) -%}"
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set seen.images = seen.images + 1 -%}"
    "{{- 'Picture ' ~ seen.images ~ ': <img></img>\\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""The same as a template of transformers: parts of type `image` become `Picture n: <img></img>` and a line break."""

_CAPTIONED = re.compile(rf"Picture \d+: ?{re.escape(IMAGE_MARK)}")
_PATH = re.compile(r"<img>.*?</img>", re.DOTALL)


@dataclass(frozen=True)
class _Piece:
    """Token ids with one of four fates: an answer's text, its end, the frame of any turn, or never learned."""

    ids: list[int]
    fate: str = "never"
    images: int = 0


def encode(record: Record, tokenizer: QWenTokenizer, *, answer: bool, labels: Labels) -> Sample:
    """A record as token ids and labels.

    Args:
        record: its `<image>` marks become slots; see `captioned` for the words around them.
        tokenizer: Qwen's.
        answer: False leaves the last answer out and ends where the model is to begin it.
        labels: `answer` learns each answer and its `<|im_end|>`; `upstream`, as Qwen's own code, also the
            `<|im_start|>`, `<|im_end|>` and line break of every turn, the user's and the system's too.

    Raises:
        DataError: marks and images do not match, or an image is written as a path.
    """
    learned = {"answer": {"text", "end"}, "upstream": {"text", "end", "frame"}}[labels]
    ids: list[int] = []
    targets: list[int] = []
    image_end = 0
    for piece in _pieces(record, tokenizer, answer=answer):
        ids += piece.ids
        targets += piece.ids if piece.fate in learned else [IGNORED] * len(piece.ids)
        if piece.images:
            image_end = max(i for i, token in enumerate(ids) if token == tokenizer.image_pad_id) + 1
    return Sample(id=record.id, ids=tuple(ids), labels=tuple(targets), images=record.images, image_end=image_end)


def _pieces(record: Record, tokenizer: QWenTokenizer, *, answer: bool) -> Iterator[_Piece]:
    check_marks(record)
    _refuse_paths(record)
    turns = record.turns if record.turns[0].role == "system" else (Turn("system", SYSTEM), *record.turns)
    line = tokenizer.encode_text("\n")
    shown = 0
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and i == len(turns) - 1 and not answer:
            yield _Piece([tokenizer.im_start_id, *tokenizer.encode_text("assistant"), *line])
            return
        by_model = turn.role == "assistant"
        yield _Piece([tokenizer.im_start_id], "frame")
        yield _Piece([*tokenizer.encode_text(turn.role), *line])
        text = captioned(turn.text, first=shown + 1)
        images = turn.text.count(IMAGE_MARK)
        yield _Piece(_content(text, tokenizer), "text" if by_model else "never", images)
        yield _Piece([tokenizer.im_end_id], "end" if by_model else "frame")
        yield _Piece(line, "frame")
        shown += images


def captioned(text: str, *, first: int) -> str:
    """A turn's text with `Picture n: <image>` and a line break for each mark, n counted from `first`.

    A single image goes to the front, several stay where they are. A text that has such captions is left as it is.
    """
    marks = text.count(IMAGE_MARK)
    if not marks or _CAPTIONED.search(text):
        return text
    if marks == 1:
        text = IMAGE_MARK + text.replace(IMAGE_MARK, "").strip()
    said = re.split(rf"{re.escape(IMAGE_MARK)}\n?", text)
    captions = (f"Picture {first + i}: {IMAGE_MARK}\n{after}" for i, after in enumerate(said[1:]))
    return said[0] + "".join(captions)


def _content(text: str, tokenizer: QWenTokenizer) -> list[int]:
    """Token ids of a turn's text: images are empty spans, and of the special tokens only boxes' are special."""
    ids: list[int] = []
    for i, stretch in enumerate(text.split(IMAGE_MARK)):
        ids += tokenizer.image_span("") if i else []
        ids += tokenizer.encode_text(stretch, boxes=True)
    return ids


def _refuse_paths(record: Record) -> None:
    if any(_PATH.search(turn.text) for turn in record.turns):
        raise DataError(
            f"{record.source or record.id}: an image is written as <img>path</img>. Name its file in the record's "
            f"`images`, and write {IMAGE_MARK} in the text."
        )
