"""From the images of a batch's rows to arguments of the model's forward, each file opened once or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from PIL.Image import Image
from torch import Tensor

from peft_mllm.record import ImageSource

Pixels = Callable[[Sequence[Sequence[Image]], Tensor], dict[str, Tensor]]
"""A family's `pixels`: each row's images, and the rows' ids, to keyword arguments of the model's forward."""


class Seeing(ABC):
    """A `Pixels` that can be given images unopened, and opens only those that it does not know."""

    @abstractmethod
    def __call__(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """As a family's `pixels`."""

    @abstractmethod
    def unopened(self, rows: Sequence[Sequence[ImageSource]], input_ids: Tensor) -> dict[str, Tensor]:
        """Likewise of images that nobody has opened."""


def arguments_of(rows: Sequence[Sequence[ImageSource]], pixels: Pixels, input_ids: Tensor) -> dict[str, Tensor]:
    """The images of a batch's rows in the order of their placeholders; none is no argument at all."""
    if not any(rows):
        return {}
    return pixels.unopened(rows, input_ids) if isinstance(pixels, Seeing) else pixels(opened(rows), input_ids)


def opened(rows: Sequence[Sequence[ImageSource]]) -> list[list[Image]]:
    """The images, equal ones opened once."""
    if sum(map(len, rows)) == 1:  # a key may cost a look at the whole file
        return [[source.load() for source in row] for row in rows]
    known: dict[str, Image] = {}
    for source in (source for row in rows for source in row):
        if source.key not in known:
            known[source.key] = source.load()
    return [[known[source.key] for source in row] for row in rows]
