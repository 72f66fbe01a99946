"""A record as a chat template writes it, and where in that text the answers stand.

The conversation is rendered up to each answer with the words that begin it, and again with the answer; each must
begin with the one before. So an answer's place is known by character, and nothing is searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from peft_mllm.errors import DataError, ModelError
from peft_mllm.record import IMAGE_MARK, Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: with one placeholder for each image.
        answers: where what the assistant says stands, with what ends it.
    """

    text: str
    answers: tuple[Span, ...]


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: renders; its special tokens may stand in the template.
        template: Jinja text.
        placeholder: what stands for an image in rendered text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, placeholder: str):
        self.tokenizer = tokenizer
        self.template = template
        self.placeholder = placeholder
        # of these roles text must be a string; some templates write a list of parts with its brackets and all
        self._as_strings: set[str] = set()
        for role in ("user", "system"):
            if not self._takes_parts(role):
                self._as_strings.add(role)

    def render(self, record: Record, *, answer: bool) -> Rendered:
        """Write a record.

        Raises:
            DataError: the template cannot write this conversation, or writes earlier turns anew.
        """
        turns = record.turns if answer else record.turns[:-1]
        messages = [self._message(turn) for turn in turns]
        try:
            text = self._write(messages, begin_answer=not answer)
            answers = tuple(self._span(messages, i, text) for i, turn in enumerate(turns) if turn.role == "assistant")
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{_place(record)}: the model's chat template refuses it: {error}") from error
        except _RewrittenError as error:
            raise DataError(
                f"{_place(record)}: the model's chat template {error} What is learned would not be what is asked "
                "later. Give records of one answer, or a chat template that keeps every turn as it was."
            ) from error
        if text.count(self.placeholder) != len(record.images):
            raise DataError(
                f"{_place(record)}: {text.count(self.placeholder)} {self.placeholder} in its text for "
                f"{len(record.images)} images; that word stands for an image, and must not be used otherwise."
            )
        return Rendered(text, answers)

    def _span(self, messages: Sequence[Message], i: int, text: str) -> Span:
        """Where the i-th message stands, which is an answer."""
        before = self._write(messages[:i], begin_answer=True)
        through = self._write(messages[: i + 1], begin_answer=False)
        if not through.startswith(before):
            raise _RewrittenError("begins an answer with other words than it asks for one with.")
        if not text.startswith(through):
            raise _RewrittenError("writes earlier turns anew when others follow.")
        return len(before), len(through)

    def _message(self, turn: Turn) -> Message:
        if ("system" if turn.role == "system" else "user") in self._as_strings and IMAGE_MARK not in turn.text:
            return {"role": turn.role, "content": turn.text}
        parts: list[dict[str, str]] = []
        stretches = turn.text.split(IMAGE_MARK)
        for i, stretch in enumerate(stretches):
            if i > 0:
                parts.append({"type": "image"})
                stretch = stretch.removeprefix("\n")  # the line break beside a mark belongs to the mark
            if i < len(stretches) - 1:
                stretch = stretch.removesuffix("\n")
            if stretch:
                parts.append({"type": "text", "text": stretch})
        return {"role": turn.role, "content": parts or [{"type": "text", "text": ""}]}

    def _write(self, messages: Sequence[Message], *, begin_answer: bool) -> str:
        written = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=begin_answer
        )
        assert isinstance(written, str)
        return written

    def _takes_parts(self, role: str) -> bool:
        """Whether what a role says may be given as a list of parts; else it is given as a string.

        Raises:
            ModelError: the template writes neither what a user and an assistant say.
        """
        words = ("be brief",) if role == "system" else ("what is this", "a probe of it")
        for parts in (True, False):
            said = [[{"type": "text", "text": text}] if parts else text for text in words]
            messages = [{"role": r, "content": text} for r, text in zip((role, "assistant"), said, strict=False)]
            if role == "system":
                messages.append(self._message(Turn("user", "hello")))
            try:
                written = self._write(messages, begin_answer=False)
            except (TemplateError, TypeError, KeyError, IndexError):
                continue
            if all(text in written for text in words) and "'type'" not in written:
                return parts
        if role == "system":
            return True  # it takes no system text, and will say so where there is one
        raise ModelError("The model's chat template does not write what a user and an assistant say.")


class _RewrittenError(Exception):
    """A conversation is no longer written as it was."""


def _place(record: Record) -> str:
    return record.source or record.id
