"""A study's report: a page that holds everything, and beside it tables, figures and the analysis as files.

The page needs no network and runs no script but its own, whose hash its policy names. Equal analyses give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from peft_mllm.pages import templates
from peft_mllm.study import wording
from peft_mllm.study.analysis import Analysis
from peft_mllm.study.drawings.canvas import page_svg
from peft_mllm.study.pages import head, provenance, readings
from peft_mllm.study.pages.embed import embedded
from peft_mllm.study.pages.pareto import pareto_data
from peft_mllm.study.pages.questions import telling
from peft_mllm.study.pages.runs import details, listed
from peft_mllm.study.pages.sections import ROWS, Section
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.tables.model import Table, order
from peft_mllm.study.tables.overview import overview
from peft_mllm.study.view import View
from peft_mllm.study.view import words as axis_words


@dataclass(frozen=True)
class Shown:
    """A table as the page shows it."""

    table: Table
    limits: tuple[float, float] | None = None
    most: int = ROWS

    @property
    def rows(self) -> Sequence[Sequence[Any]]:
        """Those that the page has."""
        return self.table.rows[: self.most]

    @property
    def hidden(self) -> int:
        """How many only the file has."""
        return max(0, len(self.table.rows) - self.most)

    def colour(self, row: int) -> str:
        """Of the row's method; nothing where rows are no methods."""
        return self.table.colours[row] if self.table.colours else ""

    def order(self, value: Any) -> str:
        """What the page sorts by; empty for a cell without a figure, which stays last."""
        key = order(value)
        return "" if key is None else f"{key:.6g}" if isinstance(key, float) else str(key)

    def track(self, value: Any) -> tuple[float, float, float] | None:
        """Where low, value and high lie on a line common to all rows, in per cent."""
        if self.limits is None or not isinstance(value, Estimate) or value.low is None or value.high is None:
            return None
        lowest, highest = self.limits
        width = (highest - lowest) or 1.0
        low, middle, high = (100 * (place - lowest) / width for place in (value.low, value.value, value.high))
        return low, middle, high


def render_page(analysis: Analysis, sections: Sequence[Section], svgs: Mapping[str, str]) -> str:
    """The page as text.

    Args:
        analysis: what to show.
        sections: of the same analysis.
        svgs: of each drawing, by its key, as matplotlib wrote it.
    """
    view = View(analysis)
    script = _asset("study.js")
    table = overview(view)
    figures = {
        drawing.key: Markup(page_svg(svgs[drawing.key], drawing.key, drawing.title))
        for section in sections
        for drawing in section.figures
    }
    return templates("study.pages").get_template("study.html.j2").render(
        analysis=analysis,
        words=wording,
        style=Markup(_asset("study.css")),
        script=Markup(script),
        policy=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        told=head.told(view),
        untold=head.untold(view),
        facts=provenance.facts(view),
        provenance=provenance.provenance(view),
        overview=Shown(table, _limits(table), len(table.rows)),
        overview_reading=readings.overview(view),
        filters=[(axis, axis_words(axis), view.labels(axis)) for axis in view.axes if len(view.labels(axis)) > 1],
        legend=view.looks,
        sections=[(section, [Shown(each) for each in section.tables]) for section in sections],
        figures=figures,
        asked=telling(view),
        runs=listed(view),
        details=embedded(details(view)),
        pareto=embedded(data) if (data := pareto_data(view)) else None,
    )  # fmt: skip


def _limits(table: Table) -> tuple[float, float] | None:
    """Of all scores with intervals."""
    at = next((place for place, column in enumerate(table.columns) if column.key == "score"), None)
    scores = [row[at] for row in table.rows if isinstance(row[at], Estimate)] if at is not None else []
    ends = [end for score in scores for end in (score.low, score.high) if end is not None]
    return (min(ends), max(ends)) if ends else None


def _asset(name: str) -> str:
    return (files("peft_mllm.study.pages") / "templates" / name).read_text(encoding="utf-8")
