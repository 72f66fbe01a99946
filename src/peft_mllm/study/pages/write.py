"""Writing a report: the page, and its tables, figures and analysis as files, all of them or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.files import disk_errors, new_directory, temporary_name
from peft_mllm.study.analysis import Analysis
from peft_mllm.study.drawings.canvas import to_pdf, to_svg
from peft_mllm.study.outcomes import Outcome
from peft_mllm.study.pages.page import render_page
from peft_mllm.study.pages.sections import sections
from peft_mllm.study.tables.findings import findings
from peft_mllm.study.tables.model import Table
from peft_mllm.study.tables.overview import costs, families, scores
from peft_mllm.study.tables.writers import csv_table, latex_table, markdown_table
from peft_mllm.study.view import View

PAGE = "index.html"
EVERYTHING = "everything.json"
CONTENT = frozenset({PAGE, EVERYTHING, "tables", "figures"})
"""What a report's directory holds, and nothing else."""


def write_study_report(analysis: Analysis, directory: Path) -> Path:
    """Write a report.

    Args:
        analysis: what was found.
        directory: of the report; one that is there is replaced as a whole.

    Returns:
        The page.

    Raises:
        DataError: the directory holds something that is no report's.
        DiskError: it cannot be written; what was there is untouched.
    """
    _check(directory)
    view = View(analysis)
    parts = sections(view)
    drawings = [drawing for part in parts for drawing in part.figures]
    svgs = {drawing.key: to_svg(drawing) for drawing in drawings}
    contents: dict[str, str | bytes] = {
        PAGE: render_page(analysis, parts, svgs),
        EVERYTHING: json.dumps(everything(analysis), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        **_tables(view),
        **{f"figures/{key}.svg": text for key, text in svgs.items()},
        **{f"figures/{drawing.key}.pdf": to_pdf(drawing) for drawing in drawings},
    }
    _replace(directory, contents)
    return directory / PAGE


def everything(analysis: Analysis) -> dict[str, Any]:
    """The analysis for a program; of the outcomes no single question's score."""
    return {
        field.name: _plain(getattr(analysis, field.name)) for field in fields(analysis) if field.name != "outcomes"
    } | {"outcomes": [_outcome(outcome) for outcome in analysis.outcomes]}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": outcome.run,
        "factors": _plain(outcome.factors),
        "seed": outcome.seed,
        "scores": {
            task: {"metric": answers.metric, "value": _plain(answers.value), "unit": answers.unit,
                   "questions": len(answers.ids), "values": _plain(answers.values)}
            for task, answers in outcome.scores.items()
        },
        "figures": _plain(outcome.figures),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """As JSON holds it; a figure that is not finite is none."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        number = float(value)
        return number if abs(number) < float("inf") else None
    return value


def _tables(view: View) -> dict[str, str | bytes]:
    made: Sequence[Table] = [scores(view), costs(view), *findings(view)]
    contents: dict[str, str | bytes] = {}
    for table in made:
        contents[f"tables/{table.name}.md"] = markdown_table(table)
        contents[f"tables/{table.name}.csv"] = csv_table(table)
        contents[f"tables/{table.name}.tex"] = latex_table([table], label=f"tab:{table.name}")
    contents["tables/scores.tex"] = latex_table(families(view), label="tab:scores")
    return contents


def _check(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory}: is a file. Name a directory for the report.")
    strange = sorted({each.name for each in directory.iterdir()} - CONTENT) if directory.is_dir() else []
    if strange:
        raise DataError(
            f"{directory}: holds {strange[0]!r}, which is no part of a report, and a report replaces its directory as a"
            " whole. Name another."
        )


def _replace(directory: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write everything beside, then let it take the old report's place."""
    fresh, old = temporary_name(directory), temporary_name(directory)
    with new_directory(fresh, what="the report") as folder:
        for name in ("tables", "figures"):
            (folder / name).mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(_bytes(content))
    with disk_errors(directory, "the report"):
        if directory.exists():
            directory.replace(old)
        try:
            fresh.replace(directory)
        except OSError:
            if old.exists():
                old.replace(directory)
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _bytes(content: str | bytes) -> bytes:
    # half a surrogate pair has no UTF-8 form
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
