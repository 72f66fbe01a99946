"""The pictures inside a model's image arguments: resized, padded, cut into tiles, back from normalised numbers.

Families differ in what they give a model: one picture an image, several tiles, or rows of patches. The first two are
pictures already; patches are put together again where the grid is told. Anything else is not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peft_mllm.data.encode import Sample
from peft_mllm.models.base import Family


@dataclass(frozen=True)
class Seen:
    """What a model is given of a record's images.

    Attributes:
        pictures: in the order in which it gets them.
        note: what they are, in a sentence.
    """

    pictures: tuple[Image.Image, ...]
    note: str


def seen(family: Family, sample: Sample, images: Sequence[Image.Image]) -> Seen:
    """The pictures of a record's images.

    Args:
        family: makes the image arguments.
        sample: the record's tokens, on which some arguments depend.
        images: as they were loaded.
    """
    if not images:
        return Seen((), "")
    arguments = family.pixels([list(images)], torch.tensor([sample.ids]))
    values = arguments.get("pixel_values")
    processor = _processor(family)
    if values is not None and values.ndim >= 4 and values.shape[-3] == 3:
        tiles = values.float().reshape(-1, *values.shape[-3:])
        # a tile that only fills the tensor up is all zeros before anything is taken back
        pictures = tuple(_picture(tile, processor) for tile in tiles if tile.any())
        return Seen(pictures, _tiles_in_words(len(pictures), len(images), values.shape[-1], values.shape[-2]))
    if values is not None and "image_grid_thw" in arguments:
        grids = arguments["image_grid_thw"].tolist()
        pictures = tuple(_picture(each, processor) for each in _from_patches(values.float(), grids, processor))
        return Seen(pictures, f"put together from {len(values)} patches of {processor.patch_size} pixels")
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arguments.items())
    return Seen(tuple(images), f"as read: what the model gets is no picture ({shapes})")


def _processor(family: Family) -> Any:
    """The image processor, where a family has it."""
    own = getattr(family, "image_processor", None)
    return own if own is not None else family.processor.image_processor  # type: ignore[attr-defined]


def _tiles_in_words(tiles: int, images: int, width: int, height: int) -> str:
    return f"{width} x {height} pixels" + (f", cut into {tiles} pictures" if tiles > images else "")


def _picture(values: Tensor, processor: Any) -> Image.Image:
    """Numbers (3, H, W) as a picture: normalising and scaling are undone."""
    if getattr(processor, "do_normalize", None) is not False:
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if getattr(processor, "do_rescale", None) is not False:
        values = values * 255
    return Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy().astype(np.uint8))


def _from_patches(values: Tensor, grids: Sequence[Sequence[int]], processor: Any) -> Iterator[Tensor]:
    """Each image (3, H, W) from patches (N, 3 * T * P * P), which stand in blocks of M x M.

    Args:
        values: the patches of all images.
        grids: frames, rows and columns of patches of each.
        processor: says P, T and M.
    """
    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    start = 0
    for time, rows, columns in grids:
        count = time * rows * columns
        blocks = values[start : start + count].reshape(
            time, rows // merge, columns // merge, merge, merge, 3, frames, patch, patch
        )
        start += count
        first = blocks[0, :, :, :, :, :, 0]  # an image is one frame, given twice
        # (rows/M, columns/M, M, M, 3, P, P) -> (3, rows/M, M, P, columns/M, M, P)
        yield first.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
