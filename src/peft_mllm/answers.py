"""Answers on the disk as they come: appended, durable, and never taken for those of another model or prompt.

A line of predictions/TASK.jsonl carries the hash of everything that decides its answer (`asked`). A line with the
hash of the question now asked is that question's answer; any other is none, whoever wrote it. So a command that was
killed goes on where it stopped, and one that is finished asks nothing again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft_mllm.files import append_lines, canonical_json, write_lines

Stop = Literal["end", "length", "choice"]


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
        text: the answer.
        tokens: generated, the end mark left out; or of the choice that was taken.
        stop: `end` by itself, `length` cut at the limit, `choice` taken by its likelihood.
        losses: of each choice, where it was taken by its likelihood; the lowest won.
    """

    text: str
    tokens: int
    stop: Stop
    losses: tuple[float, ...] = ()

    def fields(self) -> dict[str, Any]:
        """As they stand in a line."""
        said: dict[str, Any] = {"prediction": self.text, "tokens": self.tokens, "stop": self.stop}
        return said | ({"choice_losses": list(self.losses)} if self.losses else {})


def question_key(conditions: Mapping[str, Any], id: str, prompt_sha256: str) -> str:
    """The hash of a question under conditions: model, decoding, and what else decides an answer."""
    return hashlib.sha256(canonical_json([conditions, id, prompt_sha256])).hexdigest()


class AnswerFile:
    """The answers of one task, on their way to being its predictions.

    Args:
        path: predictions/TASK.jsonl; None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def recall(self) -> dict[str, Answer]:
        """Hash of a question -> its answer. A torn last line is none, and a line that is not ours is none."""
        if self._path is None or not self._path.is_file():
            return {}
        found = {}
        for line in self._path.read_bytes().split(b"\n")[:-1]:
            try:
                value = json.loads(line)
                losses = tuple(map(float, value.get("choice_losses", ())))
                answer = Answer(str(value["prediction"]), int(value["tokens"]), value["stop"], losses)
                found[str(value["asked"])] = answer
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        return found

    def begin(self, kept: Mapping[str, Answer]) -> None:
        """Hold these answers and no others; what comes is appended."""
        if self._path is not None:
            write_lines(self._path, (_line(key, answer) for key, answer in kept.items()), what="the predictions")

    def append(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Add answers; they are on the disk when this returns."""
        if self._path is not None and answers:
            append_lines(self._path, (_line(key, answer) for key, answer in answers), what="the predictions")


def _line(key: str, answer: Answer) -> dict[str, Any]:
    return {"asked": key, **answer.fields()}
