"""A table before it is written anywhere: columns that know how to say their values, and rows of values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_mllm.study import wording
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.wording import GLUE, NOTHING


def _said(value: Any) -> str:
    return NOTHING if value is None or value == "" else str(value)


def _nothing(_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in CSV.
        title: its heading.
        help: what it says, in a sentence.
        text: a value for a person; never called with None.
        detail: what stands small beside it, such as an interval.
        numeric: set to the right, and sorted by size.
        spread: key of the column whose value LaTeX sets small beside this one's.
    """

    key: str
    title: str
    help: str = ""
    text: Callable[[Any], str] = _said
    detail: Callable[[Any], str] = _nothing
    numeric: bool = False
    spread: str = ""

    def say(self, value: Any) -> str:
        """The cell for a person."""
        return NOTHING if value is None else self.text(value)

    def beside(self, value: Any) -> str:
        """The cell's detail."""
        return "" if value is None else self.detail(value)


@dataclass(frozen=True)
class Table:
    """Rows of values, one for each column.

    Attributes:
        name: of its files.
        title: above it.
        caption: what a reader must know.
        strong: places (row, column) that are set bold.
        colours: of each row's method; none where rows are no methods.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    strong: frozenset[tuple[int, int]] = frozenset()
    colours: Sequence[str] = field(default=())

    def without_empty(self) -> Table:
        """The table without the columns that say nothing in any row."""
        says = [
            any(row[place] is not None and row[place] != "" for row in self.rows) for place in range(len(self.columns))
        ]
        return self._of([place for place, something in enumerate(says) if something])

    def only(self, keys: Collection[str]) -> Table:
        """The table with these columns alone."""
        return self._of([place for place, column in enumerate(self.columns) if column.key in keys])

    def _of(self, kept: Sequence[int]) -> Table:
        moved = {old: new for new, old in enumerate(kept)}
        return replace(
            self,
            columns=[self.columns[place] for place in kept],
            rows=[[row[place] for place in kept] for row in self.rows],
            strong=frozenset((row, moved[place]) for row, place in self.strong if place in moved),
        )


def order(value: Any) -> float | str | None:
    """What a cell is sorted by."""
    if isinstance(value, Estimate):
        return value.value
    return value if value is None or isinstance(value, (int, float)) else str(value)


# --- kinds of columns ---


def words(key: str, title: str, help: str = "") -> Column:
    """Text."""
    return Column(key, title, help)


def whole(key: str, title: str, help: str = "") -> Column:
    """A whole number."""
    return Column(key, title, help, text=lambda value: f"{value:,}", numeric=True)


def score(key: str, title: str, help: str = "", *, signed: bool = False, spread: str = "") -> Column:
    """A score or difference, with its interval where it has one."""
    return Column(
        key,
        title,
        help,
        text=lambda value: wording.figure(value.value if isinstance(value, Estimate) else value, signed=signed),
        detail=lambda value: wording.interval(value, signed=signed) if isinstance(value, Estimate) else "",
        numeric=True,
        spread=spread,
    )


def exact(key: str, title: str, help: str = "") -> Column:
    """A figure that needs more digits than a score, such as a loss."""
    return Column(
        key,
        title,
        help,
        text=lambda value: f"{value.value if isinstance(value, Estimate) else value:.4g}",
        detail=_limits,
        numeric=True,
    )


def _limits(value: Any) -> str:
    if not isinstance(value, Estimate) or value.low is None or value.high is None:
        return ""
    return f"{value.low:.4g} to {value.high:.4g}"


def rank(key: str, title: str, help: str = "") -> Column:
    """A mean rank with its interval."""
    return Column(
        key,
        title,
        help,
        text=lambda value: f"{value.value:.1f}",
        detail=lambda value: f"{value.low:.0f} to {value.high:.0f}",
        numeric=True,
    )


def share(key: str, title: str, help: str = "") -> Column:
    """A share from 0 to 1."""
    return Column(key, title, help, text=lambda value: f"{100 * value:.0f}{GLUE}%", numeric=True)


def probability(key: str, title: str, help: str = "") -> Column:
    """A p-value."""
    return Column(key, title, help, text=lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}", numeric=True)


def measured(key: str, title: str, text: Callable[[float], str], help: str = "") -> Column:
    """A figure with a unit of its own."""
    return Column(key, title, help, text=text, numeric=True)
