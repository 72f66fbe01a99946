"""The contract of a task: the data of one data set, its prompt, and the name of its metric."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from peft_mllm.record import Record

if TYPE_CHECKING:
    from peft_mllm.data.check import Length, Report
    from peft_mllm.data.prepare.release import Release
    from peft_mllm.data.prepared import Line

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Prompt(NamedTuple):
    """One agreed way to ask the questions of a data set.

    Attributes:
        shape: the text, with `<image>` and fields in braces.
        max_new_tokens: where an answer is cut: the limit that its authors use, or one that holds every answer.
        source: whose it is.
    """

    shape: str
    max_new_tokens: int
    source: str

    def ask(self, **fields: str) -> str:
        """The text of one question; what stands in the fields is taken as it is."""
        parts = re.split(r"\{(\w+)\}", self.shape)
        return "".join(part if place % 2 == 0 else fields[part] for place, part in enumerate(parts))


class TaskOptions(BaseModel):
    """What a user may set for a task; a task with more settings derives its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(ABC):
    """One data set as questions and answers.

    A task is final: it derives from this class, or from `PreparedTask` in reading.py, and nothing derives from it.
    It knows no model: a record's text is what a person would ask, with `<image>` where the image goes.
    """

    Options: ClassVar[type[TaskOptions]] = TaskOptions
    metric: ClassVar[str]
    """Name on the metrics shelf."""
    max_new_tokens: ClassVar[int] = 16
    """An answer is cut here when it is generated."""
    release: ClassVar[Release | None] = None
    """The data set as its owners publish it, where `peft-mllm data prepare` can make a folder of it."""
    prompts: ClassVar[Mapping[str, Prompt]] = MappingProxyType({})
    """By the value of the option `prompt`; the first is the default."""

    @abstractmethod
    def __init__(self, options: TaskOptions): ...

    @abstractmethod
    def records(self, split: Split) -> Sequence[Record]:
        """The records of a split, in a fixed order, read or made one by one when indexed.

        Raises:
            DataError: the split does not exist or cannot be read; names the file and the remedy.
        """

    def has(self, split: Split) -> bool:
        """Whether the data set has this split."""
        return True

    def record_of(self, line: Line) -> Record:
        """The record of one line of a prepared folder; only tasks with a release have these."""
        raise NotImplementedError(f"{type(self).__name__} reads no prepared folder")

    def origin(self, split: Split) -> Mapping[str, Any] | None:
        """What a result says of where a split's records come from and which of them were drawn, if anything."""
        return None

    def report(
        self,
        split: Split,
        *,
        measure: Callable[[Record], Length] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Report | None:
        """What checking a split's data found, for the line `read N = used M + quarantined K`.

        The check is made once, now or when the records are asked for; with `measure` over-long records are
        among the findings, so a caller that has a model calls this before `records`. None where there is
        nothing to check: the data is made by us, or its reader has checked it.
        """
        return None
