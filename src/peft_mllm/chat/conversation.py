"""A conversation as a value: questions with their images, and the answers. It knows no model and no screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL.Image import Image

from peft_mllm.data.images import look
from peft_mllm.data.problems import BadDataError
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, ImageSource, Record, Turn


@dataclass(frozen=True)
class SeenImage(ImageSource):
    """An image file as it was when it was added, decoded; what happens to the file later changes nothing.

    Attributes:
        path: the file.
        digest: sha256 of its content.
        picture: its pixels, RGB and upright.
    """

    path: Path
    digest: str
    picture: Image = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """The file's digest."""
        return self.digest

    def load(self) -> Image:
        """The pixels."""
        return self.picture


def see(path: str | Path) -> SeenImage:
    """Read an image file by the rules of training.

    Raises:
        BadDataError: it is missing, broken, too large or of a format that is not read.
    """
    file = Path(path).expanduser()
    seen = look(file)
    if seen.image is None:
        raise BadDataError([each for each in seen.problems if each.severity == "error"])
    return SeenImage(file, seen.digest, seen.image)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: the text, with a mark for each image.
        images: in the order of the marks.
        answer: what the model said.
    """

    question: str
    images: tuple[SeenImage, ...]
    answer: str

    @property
    def text(self) -> str:
        """The question without its marks."""
        return self.question.replace(IMAGE_MARK, "").strip()


@dataclass(frozen=True)
class Conversation:
    """What was said so far.

    Attributes:
        system: what the model is told first; None is the model's own sentence.
        exchanges: questions with their answers, in order.
    """

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def ask(self, text: str, images: Sequence[SeenImage] = (), *, id: str = "chat") -> Record:
        """The conversation with a new question, as a record whose last answer is empty.

        Args:
            text: the question. Images go to its front, unless it has a mark for each.
            images: new ones, shown with this question.
            id: the record's; the randomness of a sampled answer comes from it.

        Raises:
            DataError: there is nothing to ask, or marks and images do not fit.
        """
        question = _marked(text.strip(), len(images))
        turns = [*self._turns(), Turn("user", question), Turn("assistant", "")]
        shown = [image for exchange in self.exchanges for image in exchange.images]
        return Record(id=id, turns=tuple(turns), images=(*shown, *images), source="The question")

    def answered(self, record: Record, answer: str) -> Conversation:
        """The conversation after a question of `ask` was answered."""
        new = record.images[sum(len(exchange.images) for exchange in self.exchanges) :]
        images = tuple(image for image in new if isinstance(image, SeenImage))
        return replace(self, exchanges=(*self.exchanges, Exchange(record.question[-1].text, images, answer)))

    def undone(self) -> Conversation:
        """Without the last question and its answer.

        Raises:
            DataError: nothing was asked yet.
        """
        if not self.exchanges:
            raise DataError("There is nothing to take back.")
        return replace(self, exchanges=self.exchanges[:-1])

    def record(self) -> Record:
        """What was said, as a record that can be trained on.

        Raises:
            DataError: there is no answer to learn.
        """
        if not self.exchanges:
            raise DataError("There is nothing to save: nothing was asked yet.")
        empty = [number for number, each in enumerate(self.exchanges, start=1) if not each.answer]
        if empty:
            raise DataError(
                f"The answer to question {empty[0]} is empty, and a record needs every answer. "
                "Take it back with /undo, or start anew."
            )
        images = tuple(image for exchange in self.exchanges for image in exchange.images)
        return Record(id="chat", turns=tuple(self._turns()), images=images)

    def _turns(self) -> list[Turn]:
        turns = [Turn("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer)]
        return turns


def _marked(text: str, images: int) -> str:
    """A question's text with one mark for each image."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("The question is not UTF-8 text. Write it in UTF-8.") from None
    if not text and not images:
        raise DataError("There is nothing to ask: write a question.")
    marks = text.count(IMAGE_MARK)
    if marks == images:
        return text
    if marks:
        raise DataError(f"The question has {marks} {IMAGE_MARK} marks for {images} new images. Write one for each.")
    return "\n".join([IMAGE_MARK] * images + [text]).strip()
