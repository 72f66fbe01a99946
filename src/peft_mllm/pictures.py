"""The images of some questions, small and inside the page: found again by the task that asked them."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from peft_mllm.errors import UserError
from peft_mllm.record import Record
from peft_mllm.spec import NamedSpec
from peft_mllm.specfile import build
from peft_mllm.tasks import TASKS

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256
"""Pixels of a thumbnail's longer side, unless others are asked for."""
SMALL = 128
"""Up to this side an image is kept as it is: JPEG would spoil it and save nothing."""


def pictures(
    named: NamedSpec | None, expected: Mapping[str, Sequence[str]], *, side: int = SIDE
) -> tuple[dict[str, list[str]], str]:
    """Thumbnails of questions as data URIs, and a sentence where there are none or not all.

    Args:
        named: the task with its options.
        expected: id -> the keys of its images when it was asked; without keys, whatever it has now.
        side: pixels of a thumbnail's longer side, at most.
    """
    if named is None:
        return {}, "The images are not shown: how the task was set up is not recorded."
    try:
        found = {record.id: record for record in _records(named, expected.keys())}
        shown = {id: _thumbnails(found[id], keys, side) for id, keys in expected.items() if id in found}
    except (UserError, OSError, KeyError) as error:
        return {}, f"The images are not shown, because the data is not at hand: {' '.join(str(error).split())[:300]}"
    changed = sum(not shown.get(id) and bool(keys) for id, keys in expected.items())
    note = f"{changed} images are not shown: the data is not what it was when it was asked." if changed else ""
    return {id: uris for id, uris in shown.items() if uris}, note


def _records(named: NamedSpec, wanted: Collection[str]) -> list[Record]:
    """The wanted records of the test split; the others are only passed by."""
    if named.name not in TASKS:
        raise UserError(f"there is no task '{named.name}' here.")
    records = build(TASKS, named).records("test")
    left, found = set(wanted), []
    for i in range(len(records)):
        if not left:
            break
        record = records[i]
        if record.id in left:
            left.remove(record.id)
            found.append(record)
    return found


def _thumbnails(record: Record, keys: Sequence[str], side: int) -> list[str]:
    """None where the images are others than those that were asked about."""
    if keys and [image.key for image in record.images] != list(keys):
        return []
    return [_data_uri(image.load(), side) for image in record.images]


def _data_uri(image: Image, side: int) -> str:
    kind = "PNG" if max(image.size) <= SMALL else "JPEG"
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, kind, **({} if kind == "PNG" else {"quality": 82}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
