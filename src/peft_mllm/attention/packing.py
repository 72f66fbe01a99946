"""Where the trees of one packed row lie, and which stretches of queries see which stretches of keys.

    row = [ prefix 0 | prefix 1 | sample alone || branch branch | branch branch branch ]
            ------------ prefixes -------------   - of prefix 0   ---- of prefix 1 ---

No token of padding. All prefixes stand before all branches, and those that have branches before those that have none;
so each of the three parts of the attention is of neighbouring queries and neighbouring keys:

    within prefixes     a prefix sees itself, causal
    across              all branches of a prefix see it, whole
    within branches     a branch sees itself, causal
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby


@dataclass(frozen=True)
class Run:
    """`count` neighbouring stretches of equal length: one batched product, and no copy.

    Attributes:
        count: how many.
        query, key: where the first stretch begins in the row.
        queries, keys: tokens of a stretch.
    """

    count: int
    query: int
    queries: int
    key: int
    keys: int


@dataclass(frozen=True)
class Part:
    """Stretches of queries, one after the other in the row, each with the stretch of keys that it sees.

    Attributes:
        query, key: where the first stretch begins.
        queries, keys: the lengths of the stretches.
        causal: whether a query sees only the keys up to its own place; the stretches are then of equal length.
        again: whether an earlier part has these queries: their softmax goes on here.
    """

    query: int
    key: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    again: bool = False

    @property
    def query_end(self) -> int:
        """Where the last stretch of queries ends."""
        return self.query + sum(self.queries)

    @property
    def key_end(self) -> int:
        """Where the last stretch of keys ends."""
        return self.key + sum(self.keys)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The stretches, neighbours of equal length together."""
        return tuple(self._runs())

    def _runs(self) -> Iterator[Run]:
        query, key = self.query, self.key
        for (queries, keys), equal in groupby(zip(self.queries, self.keys, strict=True)):
            count = len(list(equal))
            yield Run(count, query, queries, key, keys)
            query, key = query + count * queries, key + count * keys


@dataclass(frozen=True)
class Packing:
    """The lengths of a packed row's pieces.

    Attributes:
        prefixes: of each tree, those with branches first. A sample alone is a prefix without branches.
        branches: of each of the first trees, the lengths of its branches.
    """

    prefixes: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        assert len(self.branches) <= len(self.prefixes), "trees with branches come first"
        assert all(self.branches), "trees without branches come last"

    @property
    def length(self) -> int:
        """T, tokens of the row."""
        return sum(self.prefixes) + sum(map(sum, self.branches))

    @property
    def longest(self) -> int:
        """Tokens of the longest path from a prefix's first token to a branch's last."""
        branched = [prefix + max(own) for prefix, own in zip(self.prefixes, self.branches, strict=False)]
        return max([*branched, *self.prefixes[len(self.branches) :]])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Which queries see which keys."""
        within = Part(0, 0, self.prefixes, self.prefixes, causal=True)
        if not self.branches:
            return (within,)
        begin, together = within.query_end, tuple(map(sum, self.branches))
        each = tuple(length for own in self.branches for length in own)
        return (
            within,
            Part(begin, 0, together, self.prefixes[: len(self.branches)], causal=False),
            Part(begin, begin, each, each, causal=True, again=True),
        )


@dataclass(frozen=True)
class Joined:
    """Packed rows one after the other in one row, none of which sees another.

    Attributes:
        rows: how each is packed.
    """

    rows: tuple[Packing, ...]

    @property
    def length(self) -> int:
        """T, tokens of all rows."""
        return sum(row.length for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest path in any row."""
        return max(row.longest for row in self.rows)

    @property
    def begins(self) -> tuple[int, ...]:
        """Where each row begins."""
        return tuple(accumulate((row.length for row in self.rows[:-1]), initial=0))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Which queries see which keys."""
        return tuple(
            replace(part, query=part.query + begin, key=part.key + begin)
            for row, begin in zip(self.rows, self.begins, strict=True)
            for part in row.parts
        )


def seeing(tokens: int, *, begin: int, length: int) -> Part:
    """The part in which a stretch of a row sees so many learned keys, which stand by themselves."""
    return Part(begin, 0, (length,), (tokens,), causal=False, again=True)
