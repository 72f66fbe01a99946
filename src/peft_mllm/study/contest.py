"""Which lines compete: those that differ in the contrasted axis alone.

An axis that belongs to the contrast (a method's size: ranks are no bottlenecks) competes with it. A line for which an
axis means nothing (the location of a method that has none) takes part at every level of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft_mllm.study.outcomes import NOT_VARIED, Cell

TASK = "task"
CONDITIONS = frozenset({"model", "connector", "vision", "data_size"})
"""Axes that are no part of a method, though a study may have each label with one method alone."""


@dataclass(frozen=True)
class Contest:
    """Lines that compete.

    Attributes:
        factors: what they share, by axis.
        members: places of the trained lines.
        base: place of the zero-shot line; None without one.
    """

    factors: Mapping[str, str]
    members: tuple[int, ...]
    base: int | None


class Structure:
    """Who competes with whom in a study.

    Args:
        cells: its lines, in the study's order.
        axes: labels by axis.
        contrast: the axis whose labels compete.
    """

    def __init__(self, cells: Sequence[Cell], axes: Mapping[str, Sequence[str]], contrast: str) -> None:
        self.cells, self.contrast = cells, contrast
        names = dict.fromkeys([*axes, *(axis for cell in cells for axis in cell.factors)])
        self.trained = tuple(place for place, cell in enumerate(cells) if not is_zero_shot(cell))
        self.bases = tuple(place for place, cell in enumerate(cells) if is_zero_shot(cell))
        self.own = tuple(axis for axis in names if axis not in (contrast, TASK) and self._belongs(axis))
        self.shared = tuple(axis for axis in names if axis != contrast and axis not in self.own)
        self.contests = tuple(self._contests())

    def name(self, place: int) -> str:
        """A line's name among those that it competes with: `lora`, or `lora rank 8`."""
        factors = self.cells[place].factors
        labels = [factors.get(axis, NOT_VARIED) for axis in (self.contrast, *self.own)]
        return " ".join(label for label in labels if label != NOT_VARIED) or NOT_VARIED

    def base_of(self, cell: Cell) -> int | None:
        """The zero-shot line of a cell: of its task where there is one, else any that was scored on it."""
        fitting = [place for place in self.bases if self._fits(self.cells[place], cell)]
        own = [place for place in fitting if self.cells[place].factors.get(TASK) == cell.factors.get(TASK)]
        scored = [place for place in fitting if task_of(cell) in self.cells[place].outcomes[0].scores]
        return next(iter([*own, *scored]), None)

    def _fits(self, base: Cell, cell: Cell) -> bool:
        return all(
            base.factors.get(axis, NOT_VARIED) in (NOT_VARIED, cell.factors.get(axis, NOT_VARIED))
            for axis in self.shared
            if axis not in (TASK, "method")
        )

    def _belongs(self, axis: str) -> bool:
        """Whether each level of the contrast has labels of this axis that no other has."""
        if axis in CONDITIONS:
            return False
        labels: dict[str, set[str]] = {}
        for place in self.trained:
            factors = self.cells[place].factors
            labels.setdefault(factors.get(self.contrast, NOT_VARIED), set()).add(factors.get(axis, NOT_VARIED))
        told = [found - {NOT_VARIED} for found in labels.values()]
        every = set[str]().union(*told)
        return len(labels) > 1 and bool(every) and sum(map(len, told)) == len(every)

    def _contests(self) -> Iterator[Contest]:
        keys = dict.fromkeys(self._key(place) for place in self.trained)
        for key in keys:
            if any(other != key and _covers(key, other) for other in keys):
                continue  # its lines take part where something is said
            members = tuple(place for place in self.trained if _covers(self._key(place), key))
            factors = dict(zip(self.shared, key, strict=True))
            base = self.base_of(next(self.cells[place] for place in members if self._key(place) == key))
            yield Contest({axis: label for axis, label in factors.items() if label != NOT_VARIED}, members, base)

    def _key(self, place: int) -> tuple[str, ...]:
        return tuple(self.cells[place].factors.get(axis, NOT_VARIED) for axis in self.shared)


def _covers(general: tuple[str, ...], special: tuple[str, ...]) -> bool:
    """Whether a key says nothing that the other does not say too."""
    return all(one in (NOT_VARIED, two) for one, two in zip(general, special, strict=True))


def is_zero_shot(cell: Cell) -> bool:
    """Whether nothing was trained in a cell's runs."""
    return cell.outcomes[0].is_zero_shot


def task_of(cell: Cell) -> str:
    """The task that a cell was trained on, or is the zero-shot line of."""
    return cell.outcomes[0].task
