"""Which runs a claim compares: groups that are equal in everything but one factor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from peft_mllm.study.paper.evidence import Parts, Tasks
from peft_mllm.study.paper.groups import Group
from peft_mllm.study.paper.names import LOCATIONS, RATES, SIZES, canonical_task

Pair = tuple[Group, Group]


@dataclass(frozen=True)
class Evidence:
    """What the claims of a study are tested on.

    Attributes:
        groups: its runs with a parameter-efficient method.
        seen: tasks that the base could already do.
    """

    groups: tuple[Group, ...]
    seen: tuple[str, ...]


_PARTS_OF_A_METHOD = ("method", "size", "location", "learning_rate")


def split_by(groups: Sequence[Group], field: str, *, also: Sequence[str] = ()) -> list[dict[Hashable, Group]]:
    """Groups that share every label but one axis's, by what they are there; only where there are two values.

    What a search chose for each group (a learning rate, a size) is not an axis, and may differ.

    Args:
        groups: to be matched.
        field: of `Setting`, and the name of the axis.
        also: further axes that may differ.
    """
    free = (field, *also)
    found: dict[Hashable, dict[Hashable, Group]] = {}
    for group in groups:
        factors = tuple(sorted((axis, label) for axis, label in group.factors.items() if axis not in free))
        found.setdefault((group.method, factors), {}).setdefault(getattr(group.setting, field), group)
    return [levels for levels in found.values() if len(levels) > 1]


def pairs(groups: Sequence[Group], field: str, first: Sequence[Hashable], second: Hashable) -> list[Pair]:
    """Matched groups at one of the first levels and at the second."""
    return [
        (levels[level], levels[second])
        for levels in split_by(groups, field)
        if second in levels
        for level in first
        if level in levels
    ]


def ends(groups: Sequence[Group], field: str, *, also: Sequence[str] = ()) -> list[Pair]:
    """Matched groups at the largest and at the smallest value of a number."""
    found = []
    for levels in split_by(groups, field, also=also):
        ordered = in_order(levels)
        if len(ordered) > 1:
            found.append((ordered[-1], ordered[0]))
    return found


def in_order(levels: Mapping[Hashable, Group]) -> list[Group]:
    """Groups by a number, the smallest first; no number is all of the data, and the largest."""
    return [group for _, group in sorted(levels.items(), key=lambda item: _number(item[0]))]


def minus(found: Sequence[Pair]) -> list[Parts]:
    """First minus second."""
    return [((1.0, first), (-1.0, second)) for first, second in found]


def between_methods(groups: Sequence[Group]) -> list[dict[str, Group]]:
    """Groups that differ in the method, each method in the paper's setting where the study has several of it."""
    found: dict[Hashable, dict[str, list[Group]]] = {}
    for group in groups:
        factors = tuple(
            sorted((axis, label) for axis, label in group.factors.items() if axis not in _PARTS_OF_A_METHOD)
        )
        found.setdefault(factors, {}).setdefault(group.method, []).append(group)
    return [{name: min(each, key=_distance) for name, each in methods.items()} for methods in found.values()]


def versus(groups: Sequence[Group], first: str, second: str) -> list[Parts]:
    """First method minus second, all else equal."""
    return minus([(each[first], each[second]) for each in between_methods(groups) if {first, second} <= each.keys()])


def methods_of(groups: Sequence[Group]) -> tuple[str, ...]:
    """Names in order of appearance."""
    return tuple(dict.fromkeys(group.method for group in groups))


# --- which scores count ---


def trained_task(group: Group) -> Sequence[str]:
    """The task that it was trained on."""
    return (group.trained,) if group.trained else ()


def unseen_by(seen: Sequence[str]) -> Tasks:
    """The trained task, where the base could not do it; with no task called seen, every one."""
    return lambda group: [task for task in trained_task(group) if not _is_in(task, seen)]


def seen_by(seen: Sequence[str], groups: Sequence[Group]) -> tuple[Tasks, str]:
    """Scores on tasks that the base could do, and what they are in words.

    The paper trains on each seen task and scores it there. A study that never trains on one has what is left of it
    after training on another task, which is a harder question of the same kind.
    """
    if any(_is_in(group.trained, seen) for group in groups):
        return (lambda group: [task for task in trained_task(group) if _is_in(task, seen)]), "trained on seen tasks"
    return (
        lambda group: [task for task in group.tasks if _is_in(task, seen)]
    ), "on seen tasks, after training on another"


def _is_in(task: str, seen: Sequence[str]) -> bool:
    return bool(task) and canonical_task(task) in {canonical_task(name) for name in seen}


def _distance(group: Group) -> tuple[bool, ...]:
    """How far a setting is from the paper's own; of equals the first of the study is taken."""
    setting = group.setting
    return (
        bool(setting.location) and setting.location != LOCATIONS.get(setting.method, setting.location),
        setting.size is not None and setting.size != SIZES.get(setting.method, setting.size),
        setting.learning_rate is not None and setting.learning_rate != RATES.get(setting.method),
    )


def _number(value: Hashable) -> float:
    return float(value) if isinstance(value, int | float) else float("inf")
