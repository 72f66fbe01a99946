"""How the answers of a data set are spread: a model that always says the same may score well on a lopsided one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_mllm.data.problems import Problem, problem

ENOUGH = 20
"""Answers below which a share says little."""

_KEPT = 200  # characters: what is longer is told apart by its beginning


@dataclass
class Answers:
    """The last answers of records.

    Attributes:
        counts: how often each was given, in lower case without surrounding space.
        first: the record that gave each first, from 0.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, answer: str, number: int) -> None:
        """Count an answer."""
        said = answer.strip().lower()[:_KEPT]
        self.counts[said] += 1
        self.first.setdefault(said, number)

    def problems(self) -> Iterator[tuple[int, Problem]]:
        """The answer that stands out, with the first record that gives it."""
        total, kinds = self.counts.total(), len(self.counts)
        if total < ENOUGH:
            return
        answer, count = self.counts.most_common(1)[0]
        if count / total > allowed_share(kinds):
            share = f"{100 * count / total:.0f} %"
            values = {"answer": answer, "count": f"{count:,}", "total": f"{total:,}", "share": share}
            yield self.first[answer], problem("unbalanced-answers", **values)


def allowed_share(kinds: int) -> float:
    """The share above which one of so many different answers stands out: half as much again as an even spread.

    At most 3/4 (of two answers) and at least 2/5 (of four answers or more).
    """
    return min(0.75, max(0.4, 1.5 / kinds))
