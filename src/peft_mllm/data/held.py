"""An image whose bytes lie in a table, not in a file of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_mllm.data.images import FileImage, Look, look
from peft_mllm.data.problems import BadDataError, refuse
from peft_mllm.record import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image


class HeldImage(ImageSource):
    """An image as the bytes of an image file.

    Args:
        read: gives the bytes; called each time, since a data set does not fit into memory.
        identity: what tells it from other images without reading it.
        name: what to call it in messages.
        seal: sha256 of the content when it was checked; see `FileImage`.
    """

    def __init__(self, read: Callable[[], bytes], *, identity: str, name: str, seal: str | None = None):
        self.read = read
        self.identity = identity
        self.name = name
        self.seal = seal

    @property
    def key(self) -> str:
        """The sha256 of the bytes."""
        return self.seal or hashlib.sha256(self.read()).hexdigest()

    def look(self) -> Look:
        """Decode it completely; raises nothing for what the bytes may hold."""
        return look(Path(self.name), name=self.name, data=self.read())

    def load(self) -> Image:
        """Return the image: RGB, upright, fully decoded, transparency on white.

        Raises:
            BadDataError: for the first error that a look finds; or the content is not what was checked.
        """
        seen = self.look()
        if self.seal is not None and seen.digest != self.seal:
            raise refuse("image-changed", path=self.name)
        if seen.image is None:
            raise BadDataError([each for each in seen.problems if each.severity == "error"])
        return seen.image

    def __repr__(self) -> str:
        return f"HeldImage({self.identity!r})"


class RemoteImage(ImageSource):
    """An image named by its address: it can be written down again, never loaded."""

    def __init__(self, address: str):
        self.name = self.identity = address

    @property
    def key(self) -> str:
        """There is none: nothing is fetched from data."""
        raise refuse("image-url", path=self.name)

    def load(self) -> Image:
        """Refuse."""
        raise refuse("image-url", path=self.name)

    def __repr__(self) -> str:
        return f"RemoteImage({self.name!r})"


DataImage = FileImage | HeldImage | RemoteImage
"""An image that a user's data names; `identity` and `name` are of every kind."""
