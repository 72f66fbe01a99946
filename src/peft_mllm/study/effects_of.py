"""What each factor does, all else equal: paired differences between its levels, pooled over matched cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from peft_mllm.study.analysis import Effect
from peft_mllm.study.contest import TASK
from peft_mllm.study.inference.differences import holm
from peft_mllm.study.inference.effects import Cell, factor_effect
from peft_mllm.study.outcomes import NOT_VARIED, ZERO_SHOT
from peft_mllm.study.overview import Row
from peft_mllm.study.pairing import Group, Scores, comparable
from peft_mllm.study.statistics import Estimate

NO_FACTORS = ("method", TASK)
"""Axes whose levels are compared by blocks, or are no alternatives."""

Where = tuple[tuple[str, str], ...]
Matched = tuple[Row, Row]


def effects_of(
    rows: Sequence[Row], axes: Mapping[str, Sequence[str]], *, where: Sequence[str] = ("method", TASK)
) -> tuple[Effect, ...]:
    """The effect of every axis with two or more levels, but method and task.

    Args:
        rows: lines of the study.
        axes: labels by axis, in order: effects are of neighbours, and of the last against the first.
        where: axes by whose labels the effects are given too, each by itself.
    """
    return tuple(
        effect
        for axis, labels in axes.items()
        if axis not in NO_FACTORS and len(labels) > 1
        for effect in _adjusted(list(_effects_of_axis(axis, labels, rows, where)))
    )


def _effects_of_axis(axis: str, labels: Sequence[str], rows: Sequence[Row], where: Sequence[str]) -> Iterator[Effect]:
    matched = _matched_rows(axis, rows)
    for kind in ("method",) if _differs_by_method(matched) else ("", *where):
        values = list(dict.fromkeys(_label(levels, kind) for levels in matched)) if kind else [""]
        for value in values:
            there = [levels for levels in matched if not kind or _label(levels, kind) == value]
            if kind and (len(there) == len(matched) or value == NOT_VARIED):
                continue  # says what the pooled row says
            yield from _between_levels(axis, labels, there, {kind: value} if kind else {})


def _differs_by_method(matched: Sequence[Mapping[str, Row]]) -> bool:
    """Whether no two methods share a level, so that there is nothing to pool: ranks are no bottlenecks."""
    methods: dict[str, set[str]] = {}
    for levels in matched:
        for label in levels:
            methods.setdefault(label, set()).add(_label(levels, "method"))
    return len(set[str]().union(*methods.values())) > 1 and all(len(each) == 1 for each in methods.values())


def _matched_rows(axis: str, rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows that are equal but for one axis, by their label there; only where there are two."""
    found: dict[Where, dict[str, Row]] = {}
    for row in rows:
        factors = row.cell.factors
        label = factors.get(axis, NOT_VARIED)
        if label == NOT_VARIED or factors.get("method") == ZERO_SHOT or row.own is None or not row.own.known:
            continue
        rest = tuple((name, each) for name, each in factors.items() if name != axis)
        found.setdefault(rest, {})[label] = row
    return [levels for levels in found.values() if len(levels) > 1]


def _label(levels: Mapping[str, Row], axis: str) -> str:
    return next(iter(levels.values())).cell.factors.get(axis, NOT_VARIED)


def _between_levels(
    axis: str, labels: Sequence[str], matched: Sequence[Mapping[str, Row]], where: Mapping[str, str]
) -> Iterator[Effect]:
    there = [label for label in labels if any(label in levels for levels in matched)]
    changes = list(pairwise(there)) + ([(there[0], there[-1])] if len(there) > 2 else [])
    for low, high in changes:
        pairs = [(levels[low], levels[high]) for levels in matched if low in levels and high in levels]
        effect = _effect(axis, low, high, where, pairs)
        if effect is not None:
            yield effect


def _effect(axis: str, low: str, high: str, where: Mapping[str, str], pairs: Sequence[Matched]) -> Effect | None:
    cells = list(_cells(pairs))
    if not cells:
        return None
    found = factor_effect(cells)
    pooled = found.pooled
    signs = [each.difference.value * pooled.value > 0 for each in found.cells]
    return Effect(
        axis=axis,
        low_level=low,
        high_level=high,
        where=where,
        value=Estimate(pooled.value, pooled.low, pooled.high),
        p=pooled.p,
        p_adjusted=None,
        cells=len(cells),
        agree=sum(signs),
    )


def _cells(pairs: Sequence[Matched]) -> Iterator[Cell]:
    """Before and after of each pair, on the seeds and questions that all pairs of its task have."""
    tasks: dict[str, dict[str, Group]] = {}
    for place, pair in enumerate(pairs):
        groups = tasks.setdefault(pair[0].task, {})
        for side, row in zip(("before", "after"), pair, strict=True):
            if row.own is not None:
                groups[f"{side} {place}"] = row.own
    for task, groups in tasks.items():
        scores = comparable(groups)
        for place in range(len(pairs)):
            before, after = scores.get(f"before {place}"), scores.get(f"after {place}")
            if before is not None and after is not None:
                points = groups[f"after {place}"].points
                yield Cell(str(place), task, _points(after, points), _points(before, points))


def _points(scores: Scores, points: float) -> Scores:
    return scores if points == 1.0 else scores * points


def _adjusted(effects: Sequence[Effect]) -> Iterator[Effect]:
    """Holm's correction over the pooled rows of an axis, and over those by another axis together."""
    kinds: dict[tuple[str, ...], list[Effect]] = {}
    for effect in effects:
        kinds.setdefault(tuple(effect.where), []).append(effect)
    for family in kinds.values():
        known = [1.0 if effect.p is None else effect.p for effect in family]
        for effect, p in zip(family, holm(known), strict=True):
            yield replace(effect, p_adjusted=None if effect.p is None else p)
