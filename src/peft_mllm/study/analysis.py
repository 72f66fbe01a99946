"""What a study found, as data: every renderer (page, Markdown, LaTeX, CSV, terminal) reads this and nothing else.

`analyse.py` makes it from outcomes. Figures are in the headline's unit (`%` for accuracies) unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_mllm.study.outcomes import Outcome
from peft_mllm.study.statistics import Estimate


@dataclass(frozen=True)
class Line:
    """One row of the overview: runs that differ in the seed alone, on the task they were trained on.

    Attributes:
        factors: label by axis.
        seeds: how many runs.
        score: mean over seeds with its interval over seeds and questions.
        sd: standard deviation over seeds; None for one seed.
        gain: score minus zero-shot's, paired by question.
        seen: mean headline of the seen tasks.
        forgotten: zero-shot's mean on the seen tasks minus this one's.
        hallucination: as the metric calls it (ledger.py), mean over seeds; None where none was measured.
        robustness: score at the last scored point of the training curve minus that at the best; None without a curve.
        figures: means over seeds of the ledger: trainable, seconds, memory, disk, flops, flops_paper.
        letters: lines of one block that share a letter cannot be told apart; empty for the zero-shot row, and for a
            line of several blocks that has others in each (`Block.letters`).
        best: whether it is told apart from every other trained line of its block, and above; in all of its blocks.
        runs: what a reader is referred to.
    """

    factors: Mapping[str, str]
    seeds: int
    score: Estimate | None
    sd: float | None
    gain: Estimate | None
    seen: float | None
    forgotten: Estimate | None
    hallucination: float | None
    robustness: float | None
    figures: Mapping[str, float]
    letters: str
    best: bool
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """Two lines of a block compared question by question and seed by seed."""

    first: str
    second: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None


@dataclass(frozen=True)
class Rank:
    """How stable a method's place is."""

    name: str
    mean: float
    low: float
    high: float
    first: float
    """Share of the bootstrap's draws in which it is first."""


@dataclass(frozen=True)
class Block:
    """Lines that may be compared: everything is equal but the contrasted axis (the method, in most studies).

    Attributes:
        factors: what they share.
        lines: places in `Analysis.lines`, highest score first.
        differences: all pairs, adjusted by Holm within the block.
        ranks: by line.
        sentence: what may be concluded, in words.
        letters: of each of `lines`: those that share one cannot be told apart; empty for zero-shot, and for a line
            that cannot be compared yet.
    """

    factors: Mapping[str, str]
    lines: tuple[int, ...]
    differences: tuple[Difference, ...]
    ranks: tuple[Rank, ...]
    sentence: str
    letters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Effect:
    """What changing one factor does, all else equal.

    Attributes:
        axis: the factor: connector, location, vision, data_size, size ...
        low_level: changed from ...
        high_level: ... to this.
        where: the cells of one row: such as {method: lora}; empty for all.
        value: mean paired difference with interval and p over seeds and questions; Holm within the axis.
        cells: how many matched cells.
        agree: how many of them have the sign of the mean.
    """

    axis: str
    low_level: str
    high_level: str
    where: Mapping[str, str]
    value: Estimate
    p: float | None
    p_adjusted: float | None
    cells: int
    agree: int


@dataclass(frozen=True)
class Overall:
    """A method over all tasks of a block of everything else: each task has equal weight.

    Attributes:
        factors: what was averaged under (without the task).
        score: mean over tasks, interval over seeds and questions.
        rank: over seeds, questions and tasks.
        tasks: how many.
    """

    factors: Mapping[str, str]
    score: Estimate
    rank: Rank
    tasks: int


@dataclass(frozen=True)
class Transfer:
    """Trained on one task, scored on another, at a point of the training curve.

    Attributes:
        point: 0 for the lowest validation loss, then 1, 2 ... after it; None for the final adapter.
        value: mean over seeds; its change against zero-shot where that is known.
    """

    factors: Mapping[str, str]
    source: str
    target: str
    point: int | None
    value: Estimate
    change: float | None


@dataclass(frozen=True)
class Trial:
    """One trial of the fair protocol's search, scored on validation data."""

    factors: Mapping[str, str]
    tried: str
    score: float | None
    chosen: bool
    run: str


@dataclass(frozen=True)
class Matched:
    """A view in which methods spend the same: parameters, or time.

    Attributes:
        by: `parameters` or `time`.
        budget: parameters, or seconds of training.
        shared: what its block shares; a row that an axis means nothing to has rivals at each level of it.
        factors: of the row.
        value: the score (parameters) or the lowest validation loss reached in that time (time).
        spent: what the row took of the budget.
        seeds: how many the value is the mean of.
        missing: rivals that have nothing to show within the budget, with each of their seeds.
    """

    by: str
    budget: float
    shared: Mapping[str, str]
    factors: Mapping[str, str]
    value: Estimate
    spent: float
    seeds: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Front:
    """The Pareto front of two figures within a block: lines that no other beats in both."""

    x: str
    y: str
    factors: Mapping[str, str]
    lines: tuple[int, ...]


@dataclass(frozen=True)
class PaperCell:
    """A figure of the paper beside ours; None where the paper's is unreadable or we have none."""

    table: str
    row: str
    column: str
    paper: float | None
    ours: Estimate | None
    difference: float | None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, tested on our runs.

    Attributes:
        number: as in docs/paper.md.
        claim: in words.
        verdict: `holds`, `does not hold`, `cannot be told`, or `not tested`: the study has not the runs for it.
        because: the figures that decide it, in a sentence.
        in_paper: what the paper's own figures say.
    """

    number: int
    claim: str
    verdict: str
    because: str
    in_paper: str


@dataclass(frozen=True)
class Analysis:
    """All that a study found.

    Attributes:
        axes: the labels of each axis, in the order of the study.
        contrast: the axis whose levels compete within a block.
        protocol: facts about how the runs were made, as term and text.
        notes: what a reader must know before trusting the figures.
        failed: runs that were set aside, with cause.
        missing: how many planned runs have no result.
        outcomes: what everything was made of, for the drill-down.
        untimed: what the lines of a block share, for each in which nothing can be compared with equal time.
    """

    title: str
    question: str
    axes: Mapping[str, tuple[str, ...]]
    contrast: str
    seen: tuple[str, ...]
    protocol: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    blocks: tuple[Block, ...]
    overall: tuple[Overall, ...]
    effects: tuple[Effect, ...]
    transfers: tuple[Transfer, ...]
    trials: tuple[Trial, ...]
    matched: tuple[Matched, ...]
    fronts: tuple[Front, ...]
    paper: tuple[PaperCell, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    missing: int
    outcomes: Sequence[Outcome]
    untimed: tuple[Mapping[str, str], ...] = ()
