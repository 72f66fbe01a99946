"""The contract of a metric: from predictions and records to per-question scores and figures.

A metric is a named rule with named variants: the official one first, those of other suites beside it. It scores
a run's predictions against records; and it reads its official files, so that `peft-mllm score` can judge the
predictions of any system by the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft_mllm.errors import DataError, SpecError
from peft_mllm.record import Record, Turn
from peft_mllm.shelf import did_you_mean


@dataclass(frozen=True)
class Variant:
    """One way to apply a metric.

    Attributes:
        rule: the rule in one line, `metric/variant: ...`; printed with every figure.
        formula: what is computed.
        changes: how its figures differ from those of the first variant, and who uses it.
    """

    rule: str
    formula: str
    changes: str = ""


@dataclass(frozen=True)
class Scores:
    """The outcome of scoring one task.

    Attributes:
        values: figures by name, in the unit the official scorer prints (per cent for accuracies).
            The first is the headline; subsets are `name/subset`.
        per_question: the headline's contribution of each record, in the order given; its mean is the headline
            (times 100 for per cent). Where the headline is the mean of several sets, each set's mean is.
        parsed: what the metric understood of each prediction; None where it understood nothing.
        details: further figures of each record, by name; empty where there are none.
    """

    values: Mapping[str, float]
    per_question: Sequence[float]
    parsed: Sequence[str | None] = field(default_factory=tuple)
    details: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def headline(self) -> float:
        """The figure that a table shows."""
        return next(iter(self.values.values()))

    @property
    def unparsed(self) -> int:
        """How many predictions could not be understood (they count as wrong)."""
        return sum(answer is None for answer in self.parsed)


@dataclass(frozen=True)
class Prediction:
    """One answer as it stands in a file.

    Attributes:
        key: the id of what it answers.
        text: the answer.
        place: file and line or entry, for messages.
    """

    key: str
    text: str
    place: str


@dataclass(frozen=True)
class Given:
    """The files that a user wants scored, and whether some ids may be missing."""

    predictions: Sequence[Path]
    references: Sequence[Path]
    questions: Sequence[Path] = ()
    partial: bool = False


@dataclass(frozen=True)
class Case:
    """What a metric read from official files, not yet joined.

    Attributes:
        predictions: the answers.
        records: what they are scored against.
        unused: references that the rule does not ask answers for, such as images without a caption for CHAIR.
        dropped: answers or questions without a reference that are not among the predictions; only with `partial`.
    """

    predictions: Sequence[Prediction]
    records: Sequence[Record]
    unused: int = 0
    dropped: int = 0


class Metric(ABC):
    """A scoring rule. Plain Python; its module begins with its source and formula."""

    source: ClassVar[str]
    """Where the rule comes from: the official script and, where there is one, the paper."""
    unit: ClassVar[str] = "per cent"
    """Of all figures: `per cent` or `0-1`, as the official scorer prints them."""
    variants: ClassVar[Mapping[str, Variant]]
    """By name; the first is the default."""
    files: ClassVar[str] = ""
    """The official files that `read` understands, in one sentence; empty where there are none."""

    def __init__(self, variant: str | None = None):
        if variant is not None and variant not in self.variants:
            raise SpecError(f"There is no variant '{variant}' of it. {did_you_mean(variant, list(self.variants))}")
        self.variant = variant or next(iter(self.variants))

    @property
    def rule(self) -> str:
        """One line that names the rule, printed with every figure."""
        return self.variants[self.variant].rule

    @abstractmethod
    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each prediction against its record's answer and meta (same order, same length).

        Raises:
            DataError: there is nothing to score, or a record lacks what the rule needs.
        """

    def read(self, given: Given) -> Case:
        """Read official files.

        Raises:
            DataError: a file is not what it must be; names the file and line.
        """
        raise DataError(f"{type(self).__name__} has no files of its own: use it as the metric of a task.")


def per_cent(right: Iterable[float]) -> float:
    """100 times the mean.

    Raises:
        DataError: there is nothing to score.
    """
    return 100 * mean(right)


def mean(values: Iterable[float]) -> float:
    """The mean.

    Raises:
        DataError: there are none.
    """
    values = list(values)
    if not values:
        raise DataError("There are no records to score. Give a split that has some.")
    return sum(values) / len(values)


def by_group(
    name: str, right: Sequence[float], groups: Sequence[Iterable[str]], *, order: Sequence[str] = ()
) -> dict[str, float]:
    """Per cent of each group, as `name/group`; a record counts in each of its groups.

    Args:
        name: the figure's.
        right: one number for each record.
        groups: the groups of each record; an empty name is none.
        order: groups that come first; the rest follows in alphabetical order.
    """
    members: dict[str, list[float]] = defaultdict(list)
    for score, names in zip(right, groups, strict=True):
        for group in names:
            if group:
                members[group].append(score)
    known = [group for group in order if group in members]
    return {f"{name}/{group}": per_cent(members[group]) for group in [*known, *sorted(members.keys() - set(known))]}


def reference(key: str, answer: str, *, question: str = "", source: str = "", **meta: Any) -> Record:
    """The record of a reference that was read from an official file."""
    return Record(id=key, turns=(Turn("user", question), Turn("assistant", answer)), meta=meta, source=source)
