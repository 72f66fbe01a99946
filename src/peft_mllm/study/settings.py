"""Which columns of a table say how a run was made, which say something of an item, and which say nothing new.

Nobody marks them, so the lines decide. A column is a factor

- if runs are told apart by it: most items of a run so far are there once for each of its texts;
- or if it has words, the same on all lines of a method, task and the factors so far (such as the model),
  unless the method alone says it already (then a method would compete with no other).

What differs within a run, such as a question's text, is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_mllm.study.columns import Codes, Column
from peft_mllm.study.wording import and_list

MODEL = "model"
"""Always a factor: what was measured on two models is never compared."""
_TABLE = 16
"""Entries per record up to which a table is quicker than sorting."""
LEAST = 0.5
"""Share of a run's items that must be there for several texts of a column, if these are several runs."""


@dataclass(frozen=True)
class Settings:
    """The factors among the columns that have no meaning by name, and what is said of the others."""

    axes: tuple[Column, ...]
    notes: tuple[str, ...]


def settings_of(method: Column, task: Column, seed: Column, item: Column | None, others: Sequence[Column]) -> Settings:
    """Sort the columns."""
    axes: list[Column] = []
    left = list(others)
    while found := next((each for each in left if _tells_apart(each, [method, task, seed, *axes], item)), None):
        axes.append(found)
        left.remove(found)
    said_by_method, unused = [], []
    for each in left:
        if all(map(is_number, filter(None, each.texts))) or _varies(each, [method, task, *axes]):
            unused.append(each.name)
        elif each.name != MODEL and len(set(each.texts) - {""}) > 1 and not _varies(each, [method]):
            said_by_method.append(each.name)
        else:
            axes.append(each)
    order = [each for each in others if each in axes]
    notes = []
    if said_by_method:
        notes.append(f"Each method has one label in the table's column {and_list(said_by_method)}, so it is no factor.")
    if unused:
        notes.append(f"Not used, since no run is told apart by it: the table's column {and_list(unused)}.")
    return Settings(tuple(order), tuple(notes))


def _tells_apart(column: Column, key: Sequence[Column], item: Column | None) -> bool:
    """Whether most items of what would be one run are there once for each of several texts."""
    runs = combined(key)
    varied = _several(runs, column.codes)[runs]
    if not varied.any():
        return False
    pairs = runs if item is None else combined([*key, item])
    several = _several(pairs, column.codes)
    there = np.zeros(len(several), dtype=np.bool_)
    there[pairs[varied]] = True
    return float(several[there].mean()) >= LEAST


def _varies(column: Column, key: Sequence[Column]) -> bool:
    """Whether it has several texts for one combination of the others."""
    return bool(_several(combined(key), column.codes).any())


def _several(groups: Codes, codes: Codes) -> Codes:
    """(groups,) whether a group has several codes."""
    many = int(groups.max()) + 1
    low, high = np.full(many, np.iinfo(np.int64).max), np.full(many, -1)
    np.minimum.at(low, groups, codes)
    np.maximum.at(high, groups, codes)
    return low != high


def combined(columns: Sequence[Column], *, by_appearance: bool = False) -> Codes:
    """One number for each combination of cells (records,), from 0 without gaps."""
    of = columns[0].codes
    for column in columns[1:]:
        of = dense(of * len(column.texts) + column.codes)
    if by_appearance:
        _, first, of = np.unique(of, return_index=True, return_inverse=True)
        place = np.empty(len(first), dtype=np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        of = place[of]
    return of


def dense(codes: Codes) -> Codes:
    """Numbers from 0 without gaps that keep equality and order."""
    size = int(codes.max()) + 1
    if size > _TABLE * len(codes) + _TABLE:
        return np.unique(codes, return_inverse=True)[1]
    there = np.zeros(size, dtype=np.bool_)
    there[codes] = True
    return (np.cumsum(there) - 1)[codes]


def is_number(text: str) -> bool:
    """Whether a cell is read as a number; `1_000` and `nan` are words."""
    try:
        return float(text) not in (float("inf"), float("-inf")) and float(text) == float(text) and "_" not in text
    except ValueError:
        return False
