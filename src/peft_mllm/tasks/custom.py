"""A user's own data: a LLaVA JSON list or messages JSONL for each split; see docs/own-data.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

from pydantic import Field

from peft_mllm.data.check import Length, Report, check
from peft_mllm.data.formats import Selection, Source
from peft_mllm.data.opening import open_records
from peft_mllm.errors import DataError
from peft_mllm.record import Record
from peft_mllm.tasks.base import Split, Task, TaskOptions


class CustomOptions(TaskOptions):
    """Where the data is, and how it is scored."""

    train: str | None = None
    """File of records to train on."""
    validation: str | None = None
    """File of records for the validation loss."""
    test: str | None = None
    """File of records to score."""
    image_root: str | None = None
    """The folder below which all images lie; each file's own if left out."""
    on_bad_data: Literal["stop", "quarantine"] = "stop"
    """`stop` at any record with an error, or leave those out, counted in the result."""
    metric: str = "exact"
    """Name on the metrics shelf."""
    max_new_tokens: int = Field(default=64, ge=1)
    """An answer is cut here when it is generated."""


class Custom(Task):
    """Own data, checked before it is used."""

    Options = CustomOptions
    metric = "exact"
    max_new_tokens = 64

    def __init__(self, options: TaskOptions):
        self.options = cast(CustomOptions, options)
        # Class attributes of a data set that is known; here the user says.
        self.metric = self.options.metric  # type: ignore[misc]
        self.max_new_tokens = self.options.max_new_tokens  # type: ignore[misc]
        self._checked: dict[Split, tuple[Source, Report]] = {}
        self._measured: set[Split] = set()

    def records(self, split: Split) -> Sequence[Record]:
        """The checked records of a split, read one by one.

        Raises:
            DataError: the split has no file; or its data is bad, with all findings, and is not to be
                quarantined or cannot be.
        """
        file, report = self._check(split, None, None)
        if report.ok:
            return file
        if report.broken:
            raise report.error()
        if self.options.on_bad_data == "stop":
            raise report.error(advice="Mend them, or leave them out with the task option `on_bad_data: quarantine`.")
        if not report.used:
            raise report.error(advice="No record is left to use.")
        return Selection(file, report.good())

    def has(self, split: Split) -> bool:
        """Whether a file was given for the split."""
        return getattr(self.options, split) is not None

    def report(
        self,
        split: Split,
        *,
        measure: Callable[[Record], Length] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Report:
        """What checking the split found; raises only where the file cannot be opened."""
        return self._check(split, measure, progress)[1]

    def _check(
        self,
        split: Split,
        measure: Callable[[Record], Length] | None,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[Source, Report]:
        """Check once; again only to measure what had not been measured."""
        if split not in self._checked or (measure is not None and split not in self._measured):
            file = self._open(split)
            report = check(file, measure=measure, progress=progress)
            file.seal(report.images)
            self._checked[split] = (file, report)
            self._measured |= set() if measure is None else {split}
        return self._checked[split]

    def _open(self, split: Split) -> Source:
        path = getattr(self.options, split)
        if path is None:
            raise DataError(f"The task has no {split} data. Set its option `{split}` to a file of records.")
        return open_records(path, image_root=self.options.image_root)
