r"""Images as Qwen-VL's data has them, inside the text: `Picture 1: <img>photos/a.jpg</img>\nWhat is this?`.

A record has an `<image>` mark instead, and the path beside the text. Captions are numbered through the conversation
and say nothing more, so they are taken off where every image has its own, and put back when Qwen-VL JSON is written.
Text that does otherwise is kept as it is. Until October 2023 Qwen's own code wrote `Picture 1:` without the space;
its model reads other tokens there, so those captions are kept, too. `pack(unpack(texts))` is always `texts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from peft_mllm.record import IMAGE_MARK

CAPTIONS = "picture_captions"
"""Key of a record whose images stand in the text without the usual captions; its value is `AS_WRITTEN`."""
AS_WRITTEN = "as-written"

MAX_PATH_BYTES = 254
"""Longer ones do not fit between `<img>` and `</img>`: a byte in each of 255 tokens, of which one must be free."""

_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_CAPTION = re.compile(r"Picture (\d+):( ?)$")
_MARK = re.compile(re.escape(IMAGE_MARK))
_GROUNDING = re.compile(r"</?(?:ref|box|quad)>")
_POINT = r"\((?:0|[1-9]\d{0,2}),(?:0|[1-9]\d{0,2})\)"
_PLACE = re.compile(rf"<box>{_POINT},{_POINT}</box>|<quad>{_POINT}(?:,{_POINT}){{3}}</quad>|<ref>[^<]*</ref>")


class Unpacked(NamedTuple):
    """Texts with marks, the paths in the order of the marks, and whether captions stand in the text as written."""

    texts: list[str]
    paths: list[str]
    as_written: bool


def has_images(text: str) -> bool:
    """Whether an image is named inside the text."""
    return _IMAGE.search(text) is not None


def unpack(texts: Sequence[str]) -> Unpacked:
    """Put marks in the place of inline images.

    Args:
        texts: what the user says, turn by turn.
    """
    paths = [path for text in texts for path in _IMAGE.findall(text)]
    plain = [_IMAGE.sub(IMAGE_MARK, text) for text in texts]
    if _captions(plain) == [(n, " ") for n in range(1, len(paths) + 1)]:
        bare = [re.sub(rf"Picture \d+: {IMAGE_MARK}", IMAGE_MARK, text) for text in plain]
        if pack(bare, paths) == list(texts):
            return Unpacked(bare, paths, False)
    return Unpacked(plain, paths, pack(plain, paths) != list(texts))


def pack(texts: Sequence[str], paths: Iterable[str], *, as_written: bool = False) -> list[str]:
    """Put images in the place of marks, each with its caption unless captions stand in the text."""
    rest = iter(enumerate(paths, start=1))
    captioned = as_written or all(each is not None and each[1] == "" for each in _captions(texts))

    def image(_: re.Match[str]) -> str:
        number, path = next(rest)
        return f"<img>{path}</img>" if captioned else f"Picture {number}: <img>{path}</img>"

    return [_MARK.sub(image, text) for text in texts]


def odd_grounding(text: str) -> str | None:
    """The first of `<ref>`, `<box>` and `<quad>` that is not as Qwen-VL was trained on it, in a few characters."""
    rest = _PLACE.sub("", text)
    found = _GROUNDING.search(rest)
    return rest[found.start() : found.start() + 40] if found else None


def _captions(texts: Sequence[str]) -> list[tuple[int, str] | None]:
    """Number and space of the caption in front of each mark; None for a mark without."""
    found = [_CAPTION.search(text, 0, mark.start()) for text in texts for mark in _MARK.finditer(text)]
    return [(int(each[1]), each[2]) if each else None for each in found]
