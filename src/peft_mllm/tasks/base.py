"""The contract of a task: the data of one data set, its prompt, and the name of its metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from peft_mllm.record import Record

if TYPE_CHECKING:
    from peft_mllm.data.check import Length, Report

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TaskOptions(BaseModel):
    """What a user may set for a task; a task with more settings derives its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(ABC):
    """One data set as questions and answers.

    A task is final: it derives from this class and nothing derives from it. It knows no model: a record's
    text is what a person would ask, with `<image>` where the image goes.
    """

    Options: ClassVar[type[TaskOptions]] = TaskOptions
    metric: ClassVar[str]
    """Name on the metrics shelf."""
    max_new_tokens: ClassVar[int] = 16
    """An answer is cut here when it is generated."""

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
