"""The Pareto front of any two figures: what nothing else beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Literal, TypeAlias

Better: TypeAlias = Literal["more", "less"]


@dataclass(frozen=True)
class Front:
    """Names on the front, in the order of the first figure, best first; and names without both figures."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def pareto(
    points: Mapping[str, tuple[float | None, float | None]], *, better: tuple[Better, Better] = ("more", "more")
) -> Front:
    """Find the points that no other point dominates: at least as good in both figures and better in one.

    Equal points are all kept. A point whose figure is None or NaN is left out, and named.
    """
    costs = {name: cost for name, point in points.items() if (cost := _cost(point, better)) is not None}
    kept: list[str] = []
    least = float("inf")
    # in the order of the first figure a point is beaten exactly by what came before and is no worse in the second
    for name in sorted(costs, key=lambda each: costs[each]):
        equal = bool(kept) and costs[kept[-1]] == costs[name]
        if costs[name][1] < least or equal:
            kept.append(name)
            least = costs[name][1]
    return Front(tuple(kept), tuple(name for name in points if name not in costs))


def _cost(point: tuple[float | None, float | None], better: tuple[Better, Better]) -> tuple[float, float] | None:
    """Both figures so that less is better; None where one is missing."""
    first, second = point
    if first is None or second is None or isnan(first) or isnan(second):
        return None
    return (-first if better[0] == "more" else first, -second if better[1] == "more" else second)
