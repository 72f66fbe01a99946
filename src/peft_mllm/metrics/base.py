"""The contract of a metric: from predictions and records to per-question scores and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft_mllm.record import Record


@dataclass(frozen=True)
class Scores:
    """The outcome of scoring one task.

    Attributes:
        values: figures by name, in the unit the official scorer prints (per cent for accuracies).
            The first is the headline; subsets are `name/subset`.
        per_question: the headline's contribution of each record, in the order given; its mean is the headline
            (times 100 for per cent).
        parsed: what the metric understood of each prediction; None where it understood nothing.
    """

    values: Mapping[str, float]
    per_question: Sequence[float]
    parsed: Sequence[str | None] = field(default_factory=tuple)

    @property
    def headline(self) -> float:
        """The figure that a table shows."""
        return next(iter(self.values.values()))

    @property
    def unparsed(self) -> int:
        """How many predictions could not be understood (they count as wrong)."""
        return sum(answer is None for answer in self.parsed)


class Metric(ABC):
    """A scoring rule. Plain Python; its module begins with its source and formula."""

    rule: ClassVar[str]
    """One line that names the rule, printed with every figure."""

    @abstractmethod
    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction against its record's answer and meta (same order, same length)."""
