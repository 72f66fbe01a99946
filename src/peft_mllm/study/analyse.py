"""From a study's outcomes to what it found: every figure that a report shows is made here, and none there.

analysis = analyse(read_study(Path("runs/studies/main")))

The same files give the same analysis, whatever the order in which runs ended: lines stand in the study's order of
labels, and no time or memory decides anything but the fronts and the view of equal time, which are about them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_mllm.study.across_tasks import overall_of
from peft_mllm.study.analysis import Analysis, Line
from peft_mllm.study.blocks import Decided, decide
from peft_mllm.study.cautions import cautions
from peft_mllm.study.contest import TASK, Structure
from peft_mllm.study.effects_of import effects_of
from peft_mllm.study.fronts import fronts_of
from peft_mllm.study.outcomes import Cell, cells_of
from peft_mllm.study.overview import Row
from peft_mllm.study.paper import claims_of, paper_cells, paper_notes
from peft_mllm.study.reading import StudyResults, order_of
from peft_mllm.study.same_spending import matched_views, without_time
from peft_mllm.study.transfers import transfers_of


def analyse(study: StudyResults) -> Analysis:
    """Compare the lines of a study, measure its factors, and say what may be concluded."""
    index = study.index
    structure = Structure(_cells(study), index.axes, index.contrast)
    rows = _rows(structure, tuple(index.seen))
    decided = [decide(contest, rows, structure) for contest in structure.contests]
    lines = _lines(rows, decided)
    left_out = [place for each in decided for place in each.left_out]
    cells = paper_cells(study.outcomes)
    compared = any(each.block.differences for each in decided)
    return Analysis(
        title=index.title,
        question=index.question,
        axes={axis: tuple(labels) for axis, labels in index.axes.items()},
        contrast=index.contrast,
        seen=tuple(index.seen),
        protocol=tuple((term, text) for term, text in index.facts),
        lines=lines,
        blocks=tuple(each.block for each in decided),
        overall=overall_of(structure, rows),
        effects=effects_of(rows, index.axes),
        transfers=transfers_of(rows, index.axes.get(TASK, ()), index.seen),
        trials=study.trials,
        matched=matched_views(structure, rows),
        fronts=fronts_of(structure.contests, lines),
        paper=cells,
        claims=claims_of(study.outcomes, seen=index.seen, blocks=_blocks(structure)),
        notes=(*cautions(study, structure, rows, left_out, compared=compared), *paper_notes(cells)),
        failed=study.failed,
        missing=study.missing,
        outcomes=study.outcomes,
        untimed=tuple(contest.factors for contest in without_time(structure, rows)),
    )


def _cells(study: StudyResults) -> list[Cell]:
    """By task and the other axes, the contrast last, so that rivals stand together."""
    axes, contrast = study.index.axes, study.index.contrast
    names = [*sorted((axis for axis in axes if axis != contrast), key=lambda axis: axis != TASK), contrast]
    order = order_of({axis: axes.get(axis, ()) for axis in names})
    return sorted(cells_of(study.outcomes), key=lambda cell: order(cell.factors))


def _blocks(structure: Structure) -> list[list[Cell]]:
    return [[structure.cells[place] for place in contest.members] for contest in structure.contests]


def _rows(structure: Structure, seen: tuple[str, ...]) -> list[Row]:
    """Every cell with its zero-shot row; that of a task is one object for all that are measured against it."""
    bases = {place: Row(structure.cells[place], None, seen) for place in structure.bases}
    rows = []
    for place, cell in enumerate(structure.cells):
        base = None if place in bases else structure.base_of(cell)
        rows.append(bases[place] if place in bases else Row(cell, bases[base] if base is not None else None, seen))
    return rows


def _lines(rows: Sequence[Row], decided: Sequence[Decided]) -> tuple[Line, ...]:
    letters: dict[int, set[str]] = {}
    best: dict[int, set[bool]] = {}
    for each in decided:
        for place in each.block.lines:
            best.setdefault(place, set()).add(place == each.best)
        for place, said in each.letters.items():
            letters.setdefault(place, set()).add(said)
    return tuple(
        row.line(letters=_only(place, letters), best=best.get(place) == {True}) for place, row in enumerate(rows)
    )


def _only(place: int, letters: Mapping[int, set[str]]) -> str:
    """A line of several blocks has letters of its own only where they agree."""
    said = letters.get(place, set())
    return next(iter(said)) if len(said) == 1 else ""
