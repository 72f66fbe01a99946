"""Somebody's table of results as a study: the same statistics, report and advice as for runs of our own.

Columns `method`, `seed`, `item`, `score` in any case; `task` (else the file's name is the task); what a run took as
`trainable`, `seconds`, `memory`, `disk`, `flops`. What else tells runs apart is a factor (settings.py). One line is
the score of one item by one run; without the column `item` a line is the score of a whole run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_mllm.errors import DataError
from peft_mllm.study.columns import Codes, Column, Table, read_columns
from peft_mllm.study.index import Index
from peft_mllm.study.ledger import DISK, FLOPS, MEMORY, SECONDS, TRAINABLE
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT, Answers, Outcome
from peft_mllm.study.reading import StudyResults
from peft_mllm.study.settings import MODEL, combined, dense, is_number, settings_of
from peft_mllm.study.wording import and_list

METHOD, SEED, ITEM, SCORE, TASK = "method", "seed", "item", "score", "task"
FIGURES = (TRAINABLE, SECONDS, MEMORY, DISK, FLOPS)
"""Columns with figures of a run: parameters, seconds, bytes, bytes, operations."""
METRIC = "imported"
ROWS = {
    **dict.fromkeys(("zero-shot", "zero shot", "zeroshot", "none", "base"), ZERO_SHOT),
    **dict.fromkeys(("full", "full fine-tuning", "full finetuning"), FULL),
}
"""Names that people give to the two rows that every study should have."""
PER_CENT_FROM = 10.0
"""A scale up to 100 whose highest score is above this is read as per cent; ratings end below."""

Scores = NDArray[np.float64]


def read_table(path: Path) -> StudyResults:
    """Read a CSV or TSV file of results.

    Raises:
        DataError: a column is missing, a cell is no number, an item is there twice, the runs of a task have no item in
            common; with file, line, column and remedy.
    """
    table = read_columns(path)
    _check_columns(table)
    runs = _runs(table)
    notes = list(runs.notes)
    scores = _numbers(table, SCORE, "score")
    items = table.columns.get(ITEM)
    _refuse_twice(table, runs, items)
    scales = _scales(table, runs, scores)
    outcomes = list(_outcomes(table, runs, scores, items, scales, notes))
    notes += [scale.note for scale in scales.values()]
    return StudyResults(_index(table, runs, outcomes, scales), tuple(outcomes), (), (), 0, tuple(dict.fromkeys(notes)))


def _check_columns(table: Table) -> None:
    known = list(table.columns)
    for needed in (METHOD, SEED, SCORE):
        if needed not in table.columns:
            others = [name for name in known if name not in {METHOD, SEED, ITEM, SCORE, TASK, *FIGURES}]
            near = difflib.get_close_matches(needed, others, n=1)
            like = f" Column '{near[0]}' looks like '{needed}': rename it." if near else ""
            raise DataError(
                f"{table.path}:1: there is no column '{needed}', only {and_list(known, most=8)}.{like} "
                "A line has method, seed, item, score; the first line names the columns."
            )


# --- runs ---


@dataclass(frozen=True)
class _Runs:
    """Which run each record belongs to.

    Attributes:
        of: (records,) number of the run, in order of first appearance.
        first: (runs,) its first record.
        names: `results.csv:2`, of each.
        factors: label by axis, of each.
        seeds: of each; None for a base that nothing is drawn for.
        figures: of each.
        labels: of every axis, in order of first appearance.
    """

    of: Codes
    first: Codes
    names: tuple[str, ...]
    factors: tuple[Mapping[str, str], ...]
    seeds: tuple[int | None, ...]
    figures: tuple[Mapping[str, float], ...]
    labels: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def task(self, run: int) -> str:
        return self.factors[run][TASK]


def _runs(table: Table) -> _Runs:
    method, seed = _methods(table), table.columns[SEED]
    task = table.columns.get(TASK) or _of_one_text(TASK, table.path.stem, table.count)
    task = _named(task, lambda text: text or table.path.stem)
    known = {METHOD, SEED, ITEM, SCORE, TASK, *FIGURES}
    others = [column for name, column in table.columns.items() if name not in known]
    settings = settings_of(method, task, seed, table.columns.get(ITEM), others)
    axes = [method, task, *settings.axes]
    of = combined([*axes, seed], by_appearance=True)
    first = np.unique(of, return_index=True)[1]
    seeds = _seeds(table, method, first)
    factors = _without_levels_of_the_base(
        [{axis.name: axis.texts[axis.codes[record]] or NOT_VARIED for axis in axes} for record in first], seeds
    )
    labels = {
        axis.name: tuple(dict.fromkeys(each[axis.name] for each in factors if each[axis.name] != NOT_VARIED))
        for axis in axes
    }
    return _Runs(
        of=of,
        first=first,
        names=tuple(f"{table.path.name}:{line}" for line in table.lines(*map(int, first))),
        factors=tuple(factors),
        seeds=tuple(seeds),
        figures=tuple(_figures(table, of, first)),
        labels=labels | {METHOD: _in_order(labels[METHOD])},
        notes=settings.notes,
    )


def _methods(table: Table) -> Column:
    column = _named(table.columns[METHOD], lambda text: ROWS.get(text.lower(), text))
    if "" in column.texts:
        record = column.first(column.texts.index(""))
        raise DataError(f"{table.place(record)}: the method is empty. Call the model as it is 'zero-shot'.")
    return column


def _named(column: Column, name: Callable[[str], str]) -> Column:
    """A column under other texts; what becomes the same is the same."""
    places: dict[str, int] = {}
    new = np.array([places.setdefault(name(text), len(places)) for text in column.texts], dtype=np.int64)
    return Column(column.name, new[column.codes], tuple(places))


def _of_one_text(name: str, text: str, count: int) -> Column:
    return Column(name, np.zeros(count, dtype=np.int64), (text,))


def _in_order(methods: Sequence[str]) -> tuple[str, ...]:
    """Rows that every study has at the ends, the others as they come."""
    ends = {ZERO_SHOT: -1, FULL: 1}
    return tuple(sorted(methods, key=lambda label: ends.get(label, 0)))


def _seeds(table: Table, method: Column, first: Codes) -> list[int | None]:
    column = table.columns[SEED]
    found: list[int | None] = []
    for record in first:
        text, base = column.texts[column.codes[record]], method.texts[method.codes[record]] == ZERO_SHOT
        try:
            number = float(text) if text else math.nan
        except ValueError:
            number = math.inf
        if not number.is_integer() and not (base and not text):
            raise DataError(
                f"{table.place(int(record))}: seed '{text}' is no whole number. Runs that differ in the seed alone "
                "have 1, 2, 3; only zero-shot has none."
            )
        found.append(int(number) if text else None)
    return found


def _without_levels_of_the_base(factors: list[dict[str, str]], seeds: list[int | None]) -> list[dict[str, str]]:
    """Nothing is drawn or tuned in a base: its one run for a model and task has no seed and no level of a factor.

    A table with several such runs means something by it, and keeps what it says.
    """
    bases = [place for place, each in enumerate(factors) if each[METHOD] == ZERO_SHOT]
    kept = (METHOD, TASK, MODEL)
    bare = {place: {a: label if a in kept else NOT_VARIED for a, label in factors[place].items()} for place in bases}
    if len({tuple(each.values()) for each in bare.values()}) == len(bases):
        for place in bases:
            factors[place], seeds[place] = bare[place], None
    return factors


def _figures(table: Table, of: Codes, first: Codes) -> Iterator[dict[str, float]]:
    columns = {name: _numbers(table, name, name, empty=True) for name in FIGURES if name in table.columns}
    for name, values in columns.items():
        differs = (values != values[first][of]) & ~(np.isnan(values) & np.isnan(values[first][of]))
        if differs.any():
            record = int(np.argmax(differs))
            raise DataError(
                f"{table.place(record)}: column '{name}' is not the figure of the run's first line, "
                f"{table.place(int(first[of[record]]))}. It is a figure of the whole run, the same on all of its lines."
            )
    for record in first:
        yield {name: float(values[record]) for name, values in columns.items() if not np.isnan(values[record])}


# --- scores ---


def _numbers(table: Table, name: str, what: str, *, empty: bool = False) -> Scores:
    """A column as finite numbers (records,); an empty cell is NaN where it may be."""
    column = table.columns[name]
    values = np.array([_number(text) for text in column.texts])
    wrong = ~np.isfinite(values)
    if empty and "" in column.texts:
        wrong[column.texts.index("")] = False
    if wrong.any():
        code = int(np.argmax(wrong))
        text = column.texts[code]
        remedy = (
            "Write decimals with a point."
            if "," in text
            else "Leave out what was not scored in all runs, or score it: what is not known is neither right nor wrong."
            if name == SCORE
            else "Write a number, or leave the cell empty."
        )
        raise DataError(f"{table.place(column.first(code))}: {what} '{text}' in column '{name}' is no number. {remedy}")
    return values[column.codes]


def _number(text: str) -> float:
    return float(text) if is_number(text) else math.nan


@dataclass(frozen=True)
class _Scale:
    """How scores become figures of a report."""

    factor: float
    unit: str
    note: str


def _scales(table: Table, runs: _Runs, scores: Scores) -> dict[str, _Scale]:
    """By task."""
    tasks = [runs.task(run) for run in range(len(runs.first))]
    names = list(dict.fromkeys(tasks))
    of = np.array([names.index(task) for task in tasks])[runs.of]
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    np.minimum.at(low, of, scores)
    np.maximum.at(high, of, scores)
    return {name: _scale(name, float(low[place]), float(high[place])) for place, name in enumerate(names)}


def _scale(task: str, low: float, high: float) -> _Scale:
    said = f"Scores of {task} lie between {low:g} and {high:g} in the table"
    if low >= 0 and high <= 1:
        return _Scale(100.0, "%", f"{said}; they are read as shares and shown as per cent.")
    if low >= 0 and PER_CENT_FROM < high <= 100:
        return _Scale(1.0, "%", f"{said}; they are read as per cent.")
    return _Scale(1.0, "", f"{said}; they are shown as they are, and more is taken as better.")


def _refuse_twice(table: Table, runs: _Runs, items: Column | None) -> None:
    pairs = runs.of if items is None else dense(runs.of * len(items.texts) + items.codes)
    twice = np.bincount(pairs) > 1
    if not twice.any():
        return
    one = int(np.argmax(twice[pairs]))
    other = int(np.flatnonzero(pairs == pairs[one])[1])
    what = "the same run" if items is None else f"item '{items.texts[items.codes[one]]}' of the same run"
    remedy = (
        "Add a column 'item' with the question's name, or a column that tells the runs apart."
        if items is None
        else "Take one out, or add a column that tells the runs apart."
    )
    raise DataError(f"{table.place(other)}: {what} is there already, in line {table.lines(one)[0]}. {remedy}")


def _outcomes(
    table: Table,
    runs: _Runs,
    scores: Scores,
    items: Column | None,
    scales: Mapping[str, _Scale],
    notes: list[str],
) -> Iterator[Outcome]:
    codes = np.zeros_like(runs.of) if items is None else items.codes
    order = np.lexsort((codes, runs.of))
    parts = np.split(order, np.cumsum(np.bincount(runs.of))[:-1])
    kept = {} if items is None else _common_items(table, runs, items, parts, notes)
    texts = items.texts if items is not None else ()
    ids = {task: tuple(texts[code] for code in np.flatnonzero(mask)) for task, mask in kept.items()}
    for run, records in enumerate(parts):
        task = runs.task(run)
        own = scores[records] * scales[task].factor
        if items is not None:
            own = own[kept[task][items.codes[records]]]
        yield Outcome(
            run=runs.names[run],
            factors=runs.factors[run],
            seed=runs.seeds[run],
            scores={
                task: Answers(
                    task=task,
                    metric=METRIC,
                    value=float(own.mean()),
                    unit=scales[task].unit,
                    ids=ids.get(task, ()),
                    scores=own if items is not None else np.empty(0),
                    values={SCORE: float(own.mean())},
                )
            },
            figures=runs.figures[run],
        )


def _common_items(
    table: Table, runs: _Runs, items: Column, parts: Sequence[Codes], notes: list[str]
) -> dict[str, NDArray[np.bool_]]:
    """By task, which items all of its runs have."""
    kept = {}
    for task in dict.fromkeys(runs.task(run) for run in range(len(parts))):
        own = [run for run in range(len(parts)) if runs.task(run) == task]
        counts = np.zeros(len(items.texts), dtype=np.int64)
        for run in own:
            counts[items.codes[parts[run]]] += 1  # an item is once in a run
        mask = counts == len(own)
        if not mask.any():
            fewest = min(own, key=lambda run: len(parts[run]))
            raise DataError(
                f"{table.path}: the {len(own)} runs of {task} have no item in common; {runs.names[fewest]} has fewest "
                f"({len(parts[fewest])}). Give a question the same name in every run."
            )
        if (dropped := int((counts > 0).sum() - mask.sum())) > 0:
            short = [runs.names[run] for run in own if len(parts[run]) < (counts > 0).sum()]
            notes.append(
                f"Of {task}, {dropped} of {int((counts > 0).sum())} items are left out, since not all runs have them "
                f"({and_list(short)}, by the run's first line)."
            )
        kept[task] = mask
    return kept


def _index(table: Table, runs: _Runs, outcomes: Sequence[Outcome], scales: Mapping[str, _Scale]) -> Index:
    units = dict.fromkeys(scale.unit or "as in the table" for scale in scales.values())
    return Index(
        title=table.path.stem,
        question="",
        protocol="as it is",
        facts=[
            ("Protocol", "a table of results; how its runs were made is not known here"),
            ("Table", f"{table.path.name}, {table.count:,} lines, {len(outcomes)} runs"),
            ("Scores", and_list([f"in {unit}" if unit == "%" else unit for unit in units])),
        ],
        contrast=METHOD,
        axes=runs.labels,
        seen=(),
        runs=(),
        expected=len(outcomes),
    )
