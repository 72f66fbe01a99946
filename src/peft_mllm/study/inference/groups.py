"""Which groups cannot be told apart, as a compact letter display.

Two groups that share a letter cannot be told apart. Letters after Piepho 2004, "An algorithm for a letter-based
representation of all-pairwise comparisons", by insertion and absorption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from string import ascii_lowercase

from peft_mllm.study.inference.differences import Comparison


@dataclass(frozen=True)
class Groups:
    """What a family of comparisons says of its groups.

    Attributes:
        letters: by name, best first; `a` is the best group's.
        best: the group with the highest mean and all that are not told apart from it, best first.
    """

    letters: Mapping[str, tuple[str, ...]]
    best: tuple[str, ...]


def group(means: Mapping[str, float], comparisons: Iterable[Comparison], *, more_is_better: bool = True) -> Groups:
    """Sort groups into those that cannot be told apart.

    Args:
        means: by name.
        comparisons: of all pairs; a pair that was not compared cannot be told apart.
        more_is_better: whether the highest mean is the best.
    """
    order = sorted(means, key=lambda name: means[name], reverse=more_is_better)
    apart = {frozenset((each.first, each.second)) for each in comparisons if each.told_apart}
    best = tuple(name for name in order if frozenset((name, order[0])) not in apart)
    return Groups(letters(order, apart), best)


def letters(order: Sequence[str], apart: Collection[frozenset[str]]) -> dict[str, tuple[str, ...]]:
    """Give letters so that two names share one exactly where they are not told apart.

    Args:
        order: the names; the first gets `a`.
        apart: the pairs that are told apart.
    """
    columns = [frozenset(order)]
    for pair in sorted(apart, key=lambda each: sorted(map(order.index, each))):
        columns = _split(columns, pair)
    columns.sort(key=lambda column: sorted(map(order.index, column)))
    named = list(zip(columns, _names(), strict=False))
    return {name: tuple(letter for column, letter in named if name in column) for name in order}


def _split(columns: Sequence[frozenset[str]], pair: frozenset[str]) -> list[frozenset[str]]:
    """Let no column hold both of a pair, and drop what then lies within another column."""
    parts: set[frozenset[str]] = set()
    for column in columns:
        parts |= {column - {name} for name in pair} if pair <= column else {column}
    return [part for part in parts if not any(part < other for other in parts)]


def _names() -> Iterable[str]:
    """From a to z, then aa to zz and so on."""
    return ("".join(name) for length in count(1) for name in product(ascii_lowercase, repeat=length))
