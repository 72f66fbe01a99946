"""What a file of records shares with another, by the content of images and the words of questions.

A model that was trained on a question of the test set is not tested by it. Two questions are the same if they are
about the same image contents in the same order and have the same words, whatever their case, spacing and
punctuation; without images, if all that the user says in the conversation is the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

from peft_mllm.data.formats import Source
from peft_mllm.data.problems import BadDataError, Problem, problem
from peft_mllm.record import IMAGE_MARK, ImageSource, Record

_WORDS = re.compile(r"\w+")


class Against:
    """What another file asks, each image of it read once.

    Args:
        source: its records; those with errors ask nothing.
        progress: called with the number of records done and of all.

    Raises:
        BadDataError: the file as a whole cannot be used.
    """

    def __init__(self, source: Source, *, progress: Callable[[int, int], None] | None = None):
        if source.broken is not None:
            line, broken = source.broken
            raise BadDataError([broken], f"{source.path}:{line}")
        self._source = source
        self._questions: dict[bytes, int] = {}
        self._images: dict[str, int] = {}
        self._told: set[str] = set()
        for number in range(len(source)):
            self._add(number)
            if progress is not None:
                progress(number + 1, len(source))

    def problems(self, record: Record, contents: Sequence[str]) -> Iterator[Problem]:
        """What a record has in common with the file.

        Args:
            record: of another file.
            contents: sha256 of its images.
        """
        asked = [(turn, self._questions.get(key)) for turn, key in questions(record, contents)]
        shared = [(turn, number) for turn, number in asked if number is not None]
        for turn, number in shared[:1]:
            yield problem("leaked-question", turn=turn, where=self._where(number))
        for image, content in zip(record.images, contents, strict=True):
            if not shared and content in self._images and content not in self._told:
                self._told.add(content)
                yield problem("leaked-image", path=_name(image), where=self._where(self._images[content]))

    def _add(self, number: int) -> None:
        record = self._source.parse(number).record
        if record is None:
            return
        try:
            contents = [image.key for image in record.images]
        except BadDataError:  # an image that is not there leaks nothing
            return
        for _, key in questions(record, contents):
            self._questions.setdefault(key, number)
        for content in contents:
            self._images.setdefault(content, number)

    def _where(self, number: int) -> str:
        record = f"record {number + 1}, " if self._source.is_list else ""
        return f"{self._source.path}, {record}line {self._source.line(number)}"


def questions(record: Record, contents: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """The number from 1 of each turn that asks, and what is equal for equal questions."""
    asked = [(number, turn.text) for number, turn in enumerate(record.turns, start=1) if turn.role == "user"]
    if not contents:
        asked = [(asked[0][0], "\n".join(text for _, text in asked))]
    for number, text in asked:
        words = " ".join(_WORDS.findall(text.replace(IMAGE_MARK, " ").casefold()))
        yield number, hashlib.blake2b("\0".join([*contents, words]).encode(), digest_size=16).digest()


def _name(image: ImageSource) -> str:
    return getattr(image, "name", image.key)
