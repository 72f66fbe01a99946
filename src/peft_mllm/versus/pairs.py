"""The paired comparison of two systems on the same questions.

For each question a pair of scores (a, b). With n_a pairs where a > b and n_b where b > a, and n = n_a + n_b:

    McNemar's exact test   p = min(1, 2 * P[Binomial(n, 1/2) <= min(n_a, n_b)])
    difference             headline of B - headline of A, with the 95 % percentile interval of a paired bootstrap

McNemar 1947, in its exact form; of graded scores it is the sign test. Pairs that are equal say nothing of which system
is better, and are left out by the test alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.study.results import Prediction, Score
from peft_mllm.study.statistics import Estimate, estimate_difference
from peft_mllm.study.wording import GLUE, figure
from peft_mllm.versus.sides import Side, read_side

SIGNIFICANT = 0.05
LISTED = 5
"""Ids that a message lists."""


@dataclass(frozen=True)
class Pair:
    """One question and both answers."""

    a: Prediction
    b: Prediction

    @property
    def id(self) -> str:
        """Of the question."""
        return self.a.id


@dataclass(frozen=True)
class Contest:
    """Both systems on one task.

    Attributes:
        task: its name.
        a, b: the figures of each.
        pairs: all questions.
        difference: headline of B minus that of A; without limits where the headline is no mean over questions.
        p: of McNemar's exact test.
    """

    task: str
    a: Score
    b: Score
    pairs: tuple[Pair, ...]
    difference: Estimate
    p: float

    def _where(self, holds: Callable[[float, float], bool]) -> list[Pair]:
        return [pair for pair in self.pairs if holds(pair.a.score, pair.b.score)]

    @property
    def only_a(self) -> list[Pair]:
        """Questions that A answered better."""
        return self._where(lambda a, b: a > b)

    @property
    def only_b(self) -> list[Pair]:
        """Questions that B answered better."""
        return self._where(lambda a, b: b > a)

    @property
    def both(self) -> int:
        """Questions that both have right, in full."""
        return len(self._where(lambda a, b: a == b >= 1))

    @property
    def neither(self) -> int:
        """Questions that both have wrong, or right in the same part."""
        return len(self._where(lambda a, b: a == b < 1))

    @property
    def told_apart(self) -> bool:
        """Whether the test tells the systems apart."""
        return self.p < SIGNIFICANT

    def to_json(self) -> dict[str, Any]:
        """All figures, and the ids of the questions that divide the two."""
        return {
            "metric": self.a.metric,
            "rule": self.a.rule,
            "n": len(self.pairs),
            "a": self.a.headline,
            "b": self.b.headline,
            "difference": self.difference.value,
            "interval": None if self.difference.low is None else [self.difference.low, self.difference.high],
            "mcnemar_p": self.p,
            "both_right": self.both,
            "only_a": [pair.id for pair in self.only_a],
            "only_b": [pair.id for pair in self.only_b],
            "neither": self.neither,
        }


@dataclass(frozen=True)
class Comparison:
    """Two systems on all tasks that both have answered.

    Attributes:
        a, b: the systems, with names that differ.
        contests: one a task.
    """

    a: Side
    b: Side
    names: tuple[str, str]
    contests: tuple[Contest, ...]

    def to_json(self) -> dict[str, Any]:
        """One object, for `--json`."""
        sides = {
            key: {"name": name, "directory": str(side.directory), "model": side.model}
            for key, name, side in zip("ab", self.names, (self.a, self.b), strict=True)
        }
        return {**sides, "tasks": {contest.task: contest.to_json() for contest in self.contests}}

    def sentences(self) -> list[str]:
        """What may be said, one sentence a task."""
        return [_sentence(contest, self.names) for contest in self.contests]


def compare_runs(first: Path, second: Path, *, task: str | None = None) -> Comparison:
    """Compare two directories.

    Args:
        first: a finished run, or what `peft-mllm evaluate --output` wrote.
        second: another.
        task: this one alone; all that both have answered if left out.

    Raises:
        DataError: one cannot be read, they have no task in common, or were not asked the same questions.
    """
    a, b = read_side(first), read_side(second)
    common = [name for name in a.scores if name in b.scores]
    if task is not None and task not in common:
        raise DataError(f"Not both have answered {task}. {_has(a)} {_has(b)}")
    if not common:
        raise DataError(f"There is no task that both have answered. {_has(a)} {_has(b)}")
    contests = tuple(_contest(name, a, b) for name in ([task] if task else common))
    return Comparison(a, b, _names(a, b), contests)


def _has(side: Side) -> str:
    return f"{side.directory} has {', '.join(side.scores) or 'no scores'}."


def _names(a: Side, b: Side) -> tuple[str, str]:
    """Names that tell the two apart."""
    if a.name != b.name:
        return a.name, b.name
    if a.directory.name != b.directory.name:
        return a.directory.name, b.directory.name
    return str(a.directory), str(b.directory)


def _contest(task: str, a: Side, b: Side) -> Contest:
    if a.scores[task].rule != b.scores[task].rule:
        raise DataError(
            f"{task}: the two were not scored by the same rule ({a.scores[task].rule}; {b.scores[task].rule}). "
            "Evaluate both by one rule."
        )
    pairs = _pairs(task, a, b)
    return Contest(
        task=task,
        a=a.scores[task],
        b=b.scores[task],
        pairs=pairs,
        difference=_difference(a.scores[task], b.scores[task], pairs),
        p=mcnemar(
            sum(pair.a.score > pair.b.score for pair in pairs), sum(pair.b.score > pair.a.score for pair in pairs)
        ),
    )


def _pairs(task: str, a: Side, b: Side) -> tuple[Pair, ...]:
    """Both answers to each question, in the order of the first's file."""
    first = {each.id: each for each in a.predictions[task]}
    second = {each.id: each for each in b.predictions[task]}
    for side, lines, found in ((a, a.predictions[task], first), (b, b.predictions[task], second)):
        if not lines or len(found) < len(lines):
            raise DataError(f"{side.directory}: its predictions of {task} are empty or have an id twice.")
    if first.keys() != second.keys():
        only = [
            f"{len(missing)} only in {side.directory} ({', '.join(sorted(missing)[:LISTED])})"
            for side, missing in ((a, first.keys() - second.keys()), (b, second.keys() - first.keys()))
            if missing
        ]
        raise DataError(
            f"{task}: the two were not asked the same questions: {'; '.join(only)}. Evaluate both on the same ones."
        )
    for what, differs in (
        ("reference", lambda x, y: x.answer != y.answer),
        ("question", lambda x, y: x.question != y.question),
        (
            "prompt, image or choices",
            lambda x, y: x.question_sha256 != y.question_sha256 and "" not in (x.question_sha256, y.question_sha256),
        ),
    ):
        other = [key for key in first if differs(first[key], second[key])]
        if other:
            raise DataError(
                f"{task}: the {what} of {len(other)} questions differs between {a.directory} and {b.directory}, of "
                f"{', '.join(other[:LISTED])} for instance. Evaluate both on the same data with the same options."
            )
    return tuple(Pair(first[key], second[key]) for key in first)


def mcnemar(only_a: int, only_b: int) -> float:
    """The p of McNemar's exact test, two-sided; 1 where no question divides the two."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return float(binomtest(min(only_a, only_b), only_a + only_b).pvalue) if only_a + only_b else 1.0


def _difference(a: Score, b: Score, pairs: Sequence[Pair]) -> Estimate:
    """B minus A in the headline's unit, with the interval of a paired bootstrap."""
    value = b.headline - a.headline
    first, second = [pair.a.score for pair in pairs], [pair.b.score for pair in pairs]
    units = [
        score.headline / mean for score, mean in ((a, sum(first) / len(first)), (b, sum(second) / len(second))) if mean
    ]
    unit = units[0] if units else 1.0
    if any(abs(other - unit) > 1e-6 * abs(unit) for other in units):
        return Estimate(value)  # a figure such as F1: no mean over questions
    scaled = [unit * score for score in second], [unit * score for score in first]
    return estimate_difference(*scaled, value=value)


def _sentence(contest: Contest, names: tuple[str, str]) -> str:
    unit = " points" if contest.a.unit else ""
    value, low, high = contest.difference.value, contest.difference.low, contest.difference.high
    span = f" (95{GLUE}% interval {figure(low, signed=True)} to {figure(high, signed=True)})" if low is not None else ""
    chance = f"McNemar's exact p = {contest.p:.2g}"
    if not contest.told_apart:
        return (
            f"{contest.task}: {names[0]} and {names[1]} cannot be told apart on {len(contest.pairs)} questions; "
            f"the difference is {figure(value, signed=True)}{unit}{span}, {chance}."
        )
    better = names[1] if len(contest.only_b) > len(contest.only_a) else names[0]
    return (
        f"{contest.task}: {better} is better on more questions than chance explains; {names[1]} minus {names[0]} is "
        f"{figure(value, signed=True)}{unit}{span}, {chance}."
    )
