"""An analysis as its readers see it: names of lines and blocks, colours, units; what page, tables and figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from peft_mllm.study.analysis import Analysis, Block, Line
from peft_mllm.study.drawings.looks import BARE, Look, looks
from peft_mllm.study.outcomes import NOT_VARIED, ZERO_SHOT, Outcome
from peft_mllm.study.wording import GLUE

SPEAKING = ("method", "task", "model")
"""Axes whose labels say by themselves what they are labels of; others are named beside the label."""
DOT = " \N{MIDDLE DOT} "


class View:
    """What is derived from an analysis for reading it; computes no figure."""

    def __init__(self, analysis: Analysis):
        self.analysis = analysis

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes in the study's order that differ between lines, and the contrast always."""
        found = dict.fromkeys([*self.analysis.axes, *(axis for line in self.analysis.lines for axis in line.factors)])
        return tuple(axis for axis in found if axis == self.analysis.contrast or len(self.labels(axis)) > 1)

    def labels(self, axis: str) -> tuple[str, ...]:
        """An axis' labels that lines have, in the study's order."""
        there = {line.factors.get(axis, NOT_VARIED) for line in self.analysis.lines}
        there -= {NOT_VARIED}
        known = [label for label in self.analysis.axes.get(axis, ()) if label in there]
        return tuple(dict.fromkeys([*known, *sorted(there - set(known))]))

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Of each level of the contrasted axis."""
        return looks([label for label in self.labels(self.analysis.contrast) if label != ZERO_SHOT])

    def look(self, factors: Mapping[str, str]) -> Look:
        """Of a line or anything else with factors."""
        return self.looks.get(factors.get(self.analysis.contrast, ""), BARE)

    def legend(self, levels: Iterable[str]) -> list[tuple[str, Look]]:
        """Names and looks of levels of the contrasted axis, in the study's order."""
        some = dict.fromkeys(levels)
        order = [
            *(level for level in self.looks if level in some),
            *(level for level in some if level not in self.looks),
        ]
        return [(level, self.looks.get(level, BARE)) for level in order]

    @cached_property
    def by_run(self) -> dict[str, Outcome]:
        """The outcomes by what a reader is referred to."""
        return {outcome.run: outcome for outcome in self.analysis.outcomes}

    def outcomes(self, line: Line) -> list[Outcome]:
        """The runs of a line, in order of seeds."""
        return [self.by_run[run] for run in line.runs if run in self.by_run]

    @cached_property
    def unit(self) -> str:
        """Of all headlines; nothing where they differ."""
        units = {answers.unit for outcome in self.analysis.outcomes for answers in outcome.scores.values()}
        return next(iter(units)) if len(units) == 1 else ""

    @property
    def in_unit(self) -> str:
        """For the title of an axis or a column."""
        return f" ({self.unit})" if self.unit else ""

    @property
    def in_points(self) -> str:
        """Likewise, of a difference."""
        return " (points)" if self.unit == "%" else self.in_unit

    def title(self, factors: Mapping[str, str], *, without: Iterable[str] = ()) -> str:
        """Factors in words: those that differ in this study."""
        left_out = set(without)
        return DOT.join(self.words(axis, factors.get(axis, "")) for axis in self.axes if axis not in left_out and
                        factors.get(axis, NOT_VARIED) != NOT_VARIED)  # fmt: skip

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Axes that the lines of one block share."""
        found = {axis for block in self.analysis.blocks for axis in block.factors}
        return tuple(axis for axis in self.axes if axis in found)

    def place(self, factors: Mapping[str, str]) -> str:
        """In words what the rivals of something share, but for the task."""
        return self.title({axis: factors[axis] for axis in self.shared if axis in factors}, without=["task"])

    def rival(self, factors: Mapping[str, str]) -> str:
        """In words what tells it from its rivals."""
        return self.title(factors, without=[*self.shared, "task"]) or factors.get(self.analysis.contrast, "")

    def words(self, axis: str, label: str) -> str:
        """`lora`, and `connector tuned`."""
        return label if axis in SPEAKING else f"{words(axis)} {label}"

    def block_title(self, block: Block) -> str:
        """What its lines share, of all that differs in this study; the task at least."""
        return self.where(block.factors)

    def where(self, factors: Mapping[str, str]) -> str:
        """The same of a block's factors."""
        return self.title(factors) or factors.get("task", "") or "all lines"

    @property
    def over(self) -> str:
        """What intervals are over."""
        return "over questions alone" if self.seeds == 1 else "over seeds and questions"

    @property
    def bars(self) -> str:
        """What a figure's bars are."""
        return f"Bars: 95{GLUE}% intervals {self.over}."

    def name(self, line: Line, shared: Mapping[str, str]) -> str:
        """A line's name where some of its factors are said elsewhere."""
        said = [axis for axis in shared if axis != self.analysis.contrast]
        return self.title(line.factors, without=said) or line.factors.get(self.analysis.contrast, "")

    def trained(self, line: Line) -> bool:
        """Whether it is no zero-shot line."""
        return line.factors.get("method") != ZERO_SHOT

    def members(self, block: Block) -> list[Line]:
        """The lines of a block."""
        return [self.analysis.lines[place] for place in block.lines]

    @cached_property
    def seeds(self) -> int:
        """Of the line with most."""
        return max((line.seeds for line in self.analysis.lines), default=0)


def words(axis: str) -> str:
    """An axis as a reader knows it."""
    return axis.replace("train.", "").replace("data.", "").replace("_", " ")


def capped(count: int, shown: int, what: str, where: str) -> str:
    """A sentence where not all are shown."""
    return f"Shown are the first {shown} of {count} {what}; all are in {where}." if count > shown else ""


def among(names: Sequence[str], chosen: Iterable[str]) -> list[str]:
    """The chosen in the order of names."""
    some = set(chosen)
    return [name for name in names if name in some]
