"""The paper's tables beside ours, cell by cell.

A row of the paper is found among our runs by model, method and setting, whatever they are called. What the paper's
row does not say, it has by default (names.py); where the study has that twice, the run nearest to the paper's
learning rate and epochs counts. A table of which we have nothing is left out as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import hypot
from typing import Any

import numpy as np

from peft_mllm.assets import PAPER
from peft_mllm.files import read_json
from peft_mllm.study.analysis import PaperCell
from peft_mllm.study.inference.intervals import clipped, mean_interval, spread
from peft_mllm.study.outcomes import Outcome
from peft_mllm.study.pairing import Scored, points_per_unit
from peft_mllm.study.paper.groups import Group, groups_of, peft_only
from peft_mllm.study.paper.names import LOCATIONS, RATES, SIZES, canonical_task
from peft_mllm.study.statistics import Estimate

Row = Mapping[str, Any]
Of = Callable[[Sequence[Group], Row, Row], Estimate | None]

EVERY = "*"
_EPOCHS = 3.0
_AS_RELEASED = "connector as the released code has it"
_MANY = 1_000_000
"""More samples than any of the paper's data sets has: all of the data, for a sort."""


@cache
def paper() -> Row:
    """What the package knows of the paper: tables and claims."""
    content: Row = read_json(PAPER)
    return content


def paper_cells(outcomes: Sequence[Outcome]) -> tuple[PaperCell, ...]:
    """The cells of every table of which the study has at least one; empty for a study on other models."""
    groups = [group for group in peft_only(groups_of(outcomes)) if group.setting.model]
    found: list[PaperCell] = []
    for table in paper()["tables"]:
        cells = list(_cells(table, groups)) if groups else []
        if any(cell.ours for cell in cells):
            found += [cell for cell in cells if cell.ours or cell.paper is not None]
    return tuple(found)


def paper_notes(cells: Sequence[PaperCell]) -> tuple[str, ...]:
    """What a reader must know before comparing; empty without cells."""
    if not cells:
        return ()
    notes = [
        "The paper trained every base on OKVQA, OCRVQA and VQAv2 before its study began, and did not release those "
        "models: where a study starts from the published ones, a difference to the paper is no failure to repeat it.",
        "The paper's figures are of one seed (its Tables 6 and 14: of three), and its own runs of one setting differ "
        "by up to 2.5 points between its tables.",
    ]
    if any(cell.ours and cell.row.startswith("Qwen") for cell in cells):
        notes.append(
            "For Qwen-VL-Chat the released code tunes embeddings and head where the paper says connector: its rows may "
            f"be either, and ours say which ({_AS_RELEASED})."
        )
    return tuple(notes)


def _cells(table: Row, groups: Sequence[Group]) -> Iterator[PaperCell]:
    measure = _KINDS.get(table.get("kind", "trained"))
    for row in table["rows"]:
        for label, where in _variants(row["row"], {**table["is"], **row["is"]}):
            ours = [measure(groups, where, {**table, **column}) if measure else None for column in table["columns"]]
            ours = _with_averages(table["columns"], ours)
            if label != row["row"] and not any(ours):
                continue
            for column, printed, own in zip(table["columns"], row["values"], ours, strict=True):
                difference = own.value - printed if own and printed is not None else None
                yield PaperCell(table["table"], label, column["column"], printed, own, difference)


def _variants(label: str, where: Row) -> Iterator[tuple[str, Row]]:
    yield label, where
    if where.get("model") == "Qwen-VL-Chat" and where.get("connector") == "tuned":
        yield f"{label} ({_AS_RELEASED})", {**where, "connector": "released"}


# --- ours, by the kind of table ---


def _trained(groups: Sequence[Group], where: Row, column: Row) -> Estimate | None:
    """The score on the task that was trained on, or its spread over seeds."""
    if column["task"] == EVERY:
        return None
    group = _best(groups, {**where, "task": column["task"]})
    if group is None or not group.trained:
        return None
    scored = group.scored(group.trained)
    if not column.get("sd"):
        return _estimate(group, group.trained, scored)
    known = spread(scored.scores) if scored else None
    return None if known is None else Estimate(known)


def _transfer(groups: Sequence[Group], where: Row, column: Row) -> Estimate | None:
    """The score on another task, so many points of the curve after the lowest validation loss."""
    if where["source"] == EVERY:
        pairs = {(row["is"]["source"], row["is"]["target"]) for row in column["rows"]} - {(EVERY, EVERY)}
        each = [_transfer(groups, {**where, "source": a, "target": b}, column) for a, b in sorted(pairs)]
        return _average([one for one in each if one]) if all(each) else None
    group = _best(groups, {**where, "task": where["source"]})
    target = next((task for task in group.tasks if canonical_task(task) == where["target"]), "") if group else ""
    scored = group.scored_at(target, column["point"]) if group and target else None
    return clipped(mean_interval(scored.scores), scored.bounds) if scored else None


def _values(groups: Sequence[Group], where: Row, column: Row) -> Estimate | None:
    """A value of a metric, by name, on whichever task it was measured."""
    group = _best(groups, where)
    for task in group.tasks if group else ():
        answers = [outcome.scores[task] for outcome in group.cell.outcomes if task in outcome.scores] if group else []
        if all(each.metric.partition(":")[0] == column["metric"] for each in answers):
            known = [each.values[column["value"]] for each in answers if column["value"] in each.values]
            return Estimate(float(np.mean(known))) if known else None
    return None


def _trainable(groups: Sequence[Group], where: Row, column: Row) -> Estimate | None:
    """Per cent of base and adapter together, as the paper counts."""
    group = _best(groups, where)
    result = group.cell.outcomes[0].result if group else None
    if result is None or not result.model.parameters:
        return None
    added = result.trainable["llm"].parameters if "llm" in result.trainable else 0
    return Estimate(100 * result.trainable_parameters / (result.model.parameters + added))


_KINDS: Mapping[str, Of] = {"trained": _trained, "transfer": _transfer, "values": _values, "trainable": _trainable}
"""Of a table that was counted by hand we have nothing."""


# --- finding the run ---


def _best(groups: Sequence[Group], where: Row) -> Group | None:
    """The group of a row and column: it must have what the row says, and is the nearest to the rest."""
    there = [group for group in groups if _is(group, where)]
    return min(there, key=lambda group: _distance(group, where), default=None)


def _is(group: Group, where: Row) -> bool:
    own, method = group.setting, where["method"]
    wanted: dict[str, Any] = {
        "model": where["model"],
        "method": method,
        "vision": where.get("vision", "frozen"),
        "location": where.get("location", LOCATIONS.get(method, "")),
        "size": where.get("size", SIZES.get(method)),
    }
    wanted |= {key: where[key] for key in ("connector", "task", "learning_rate") if key in where}
    if "task" in where:
        wanted["data_size"] = where.get("data_size")
    return all(getattr(own, key) == value for key, value in wanted.items())


def _distance(group: Group, where: Row) -> tuple[bool, bool, bool, int]:
    own = group.setting
    return (
        own.connector != where.get("connector", "tuned"),
        own.learning_rate != RATES.get(own.method),
        own.epochs != _EPOCHS,
        -(own.data_size or _MANY),
    )


# --- figures ---


def _estimate(group: Group, task: str, scored: Scored | None) -> Estimate:
    if scored is not None:
        return clipped(mean_interval(scored.scores), scored.bounds)
    answers = [outcome.scores[task] for outcome in group.cell.outcomes if task in outcome.scores]
    return Estimate(float(np.mean([each.value * points_per_unit(each.metric) for each in answers])))


def _with_averages(columns: Sequence[Row], ours: Sequence[Estimate | None]) -> list[Estimate | None]:
    """The columns that are the mean of the others, where all of these are there."""
    single = [own for column, own in zip(columns, ours, strict=True) if column.get("task") != EVERY]
    mean = _average([own for own in single if own]) if all(single) else None
    return [mean if column.get("task") == EVERY else own for column, own in zip(columns, ours, strict=True)]


def _average(each: Sequence[Estimate]) -> Estimate:
    """The mean of independent figures: half widths add as squares do."""
    value = sum(one.value for one in each) / len(each)
    if any(one.low is None or one.high is None for one in each):
        return Estimate(value)
    below = hypot(*(one.value - one.low for one in each if one.low is not None)) / len(each)
    above = hypot(*(one.high - one.value for one in each if one.high is not None)) / len(each)
    return Estimate(value, value - below, value + above)
