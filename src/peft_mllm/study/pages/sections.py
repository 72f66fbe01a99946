"""The page's sections: each analysis that has data, with its figures, its reading in words and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from peft_mllm.study.drawings import comparisons, curves, maps
from peft_mllm.study.drawings.canvas import Drawing, house_style
from peft_mllm.study.hallucination import figure_of
from peft_mllm.study.outcomes import CurvePoint
from peft_mllm.study.pages import readings
from peft_mllm.study.results import Score
from peft_mllm.study.tables import findings
from peft_mllm.study.tables.model import Table
from peft_mllm.study.view import View

ROWS = 120
"""Of a table in the page; the file has all."""


@dataclass(frozen=True)
class Part:
    """One section before it is drawn.

    Attributes:
        key: its address in the page.
        title: its heading.
        reading: what it says, in words; called when there is a figure or a table.
        figures: what is drawn, if there is data for it.
        tables: those that have rows are shown.
        scatter: whether the page's script sets any two measures against one another there.
    """

    key: str
    title: str
    reading: Callable[[View], str]
    figures: Sequence[Callable[[View], Drawing | None]] = ()
    tables: Sequence[Callable[[View], Table]] = ()
    scatter: bool = False


@dataclass(frozen=True)
class Section:
    """One section with its content; `more` says by table's name how many rows only its file has."""

    key: str
    title: str
    reading: str
    figures: Sequence[Drawing]
    tables: Sequence[Table]
    scatter: bool


def hallucination(point: CurvePoint) -> float | None:
    """Mean over the tasks whose metric measures it."""
    shares = []
    for answers in point.scores.values():
        score = Score(split="", metric=answers.metric, n=len(answers.ids), values=answers.values)
        figure = figure_of(score)
        share = figure.of(score) if figure else None
        shares += [share] if share is not None else []
    return sum(shares) / len(shares) if shares else None


def _hallucination_curves(view: View) -> Drawing | None:
    return curves.hallucination_curves(view, hallucination)


PARTS = (
    Part("groups", "Who can be told apart", readings.groups, [comparisons.blocks_plot],
         [findings.blocks, findings.differences]),
    Part("ranks", "Over all tasks", readings.ranks, [comparisons.rank_plot], [findings.overall]),
    Part("effects", "What changing one thing does", readings.effects, [comparisons.effects_plot], [findings.effects]),
    Part("curves", "Learning curves", readings.curves, [curves.loss_curves]),
    Part("stability", "Size against stability", readings.stability, [maps.stability]),
    Part("data-size", "More data", readings.data_size, [curves.data_size_curves]),
    Part("transfer", "From task to task", readings.transfer, [maps.transfer_maps], [findings.transfers]),
    Part("after-best", "Beyond the best point", readings.after_best, [curves.after_best]),
    Part("hallucination", "Hallucination", readings.hallucination,
         [comparisons.hallucination_plot, _hallucination_curves]),
    Part("pareto", "What a better score costs", readings.pareto, [maps.pareto_plot], [findings.fronts], scatter=True),
    Part("matched", "When all spend the same", readings.matched, [comparisons.matched_plot], [findings.matched]),
    Part("search", "The search", readings.search, [comparisons.trials_plot], [findings.trials]),
    Part("paper", "Against the paper", readings.paper, [comparisons.paper_plot], [findings.claims, findings.paper]),
)  # fmt: skip
"""In the page's order."""


def sections(view: View) -> list[Section]:
    """Those that have a figure or a table."""
    with house_style():
        return list(_sections(view))


def _sections(view: View) -> Iterator[Section]:
    for part in PARTS:
        figures = [drawing for draw in part.figures if (drawing := draw(view))]
        tables = [table.without_empty() for make in part.tables if (table := make(view)).rows]
        if figures or tables:
            yield Section(part.key, part.title, part.reading(view), figures, tables, part.scatter)
