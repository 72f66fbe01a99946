"""Looking at the images of a file of records, each once, and telling which are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from peft_mllm.data.held import DataImage, HeldImage
from peft_mllm.data.images import FileImage, Look, inspect
from peft_mllm.data.problems import Problem, problem
from peft_mllm.record import ImageSource


class Images:
    """The images that were looked at.

    Args:
        pool: decodes them; None does it here.

    Attributes:
        digests: sha256 of each that can be used, by identity.
        conversions: how many became RGB in which way.
    """

    def __init__(self, pool: ProcessPoolExecutor | None):
        self._pool = pool
        self._seen: dict[str, tuple[Problem, ...]] = {}
        self._first: dict[str, tuple[str, str]] = {}
        """By content: identity and name of the first file that has it."""
        self._warned: set[str] = set()
        self.digests: dict[str, str] = {}
        self.conversions: Counter[str] = Counter()

    def look_at(self, images: Sequence[DataImage]) -> None:
        """Decode those that are new."""
        new = {image.identity: image for image in images if image.identity not in self._seen}
        mapped = self._pool.map(_look, new.values(), chunksize=8) if self._pool else map(_look, new.values())
        for image, seen in zip(new.values(), mapped, strict=True):
            found = seen.problems
            self.conversions.update(seen.conversions)
            if all(each.severity == "warning" for each in found):
                self.digests[image.identity] = seen.digest
                found += self._same(image, seen.digest)
            self._seen[image.identity] = found

    def problems(self, image: DataImage) -> Iterator[Problem]:
        """An image's errors concern every record that has it; its warnings are told once."""
        for each in self._seen[image.identity]:
            if each.severity == "error" or image.identity not in self._warned:
                yield each
        self._warned.add(image.identity)

    def content(self, image: ImageSource) -> str:
        """Equal for images with the same pixels."""
        identity = image.identity if isinstance(image, DataImage) else image.key
        return self.digests.get(identity, identity)

    def _same(self, image: DataImage, digest: str) -> tuple[Problem, ...]:
        """Rows of a table each hold their image; a file beside an equal one is there twice."""
        if not isinstance(image, FileImage):
            return ()
        before, name = self._first.setdefault(digest, (image.identity, image.name))
        return () if before == image.identity else (problem("duplicate-image", path=image.name, other=name),)


def _look(image: DataImage) -> Look:
    seen = image.look() if isinstance(image, HeldImage) else inspect(image.identity, name=image.name)
    return replace(seen, image=None)
