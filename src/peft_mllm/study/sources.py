"""Where advice takes its evidence from: folders of studies, tables, and what is shipped with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from peft_mllm.assets import EVIDENCE
from peft_mllm.errors import DataError
from peft_mllm.study.columns import ENDINGS
from peft_mllm.study.evidence import SHIPPED, Evidence, evidence_from, read_evidence
from peft_mllm.study.imported import read_table
from peft_mllm.study.index import FILE as INDEX
from peft_mllm.study.reading import StudyResults, read_study

RUNS = Path("runs")
"""Where the shipped studies write: the demo into a folder of this, all others into one of its `studies`."""
STUDIES = "studies"


def read_any(path: Path) -> StudyResults:
    """A study's directory, any folder of runs, or a table of results.

    Raises:
        DataError: it is none of these, or does not fit.
    """
    return read_table(path) if path.suffix.lower() in ENDINGS else read_study(path)


def evidence_at(path: Path) -> Evidence:
    """The evidence of what `read_any` reads."""
    return evidence_from(read_any(path), path.as_posix())


def shipped(folder: Path = EVIDENCE) -> list[Evidence]:
    """The evidence that comes with the package, by name."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [replace(read_evidence(file), place=f"{file.stem}, {SHIPPED}") for file in files]


def gathered(results: Sequence[Path], *, runs: Path = RUNS) -> tuple[list[Evidence], list[str]]:
    """All evidence there is.

    Args:
        results: folders and tables; without any, every study in `runs` or below its `studies`, and what is shipped.
        runs: folder of studies.

    Returns:
        the evidence; and what could not be read, in words.

    Raises:
        DataError: one of `results` cannot be read.
    """
    if results:
        read = [evidence_at(path) for path in results]
        return read, [
            f"{each.place} has no column 'model', so it is not known what it is evidence of. Add the column."
            for each in read
            if not any(setting.model for setting in each.settings)
        ]
    found, notes = list[Evidence](), list[str]()
    for file in sorted({*runs.glob(f"*/{INDEX}"), *(runs / STUDIES).rglob(INDEX)}):
        try:
            found.append(evidence_at(file.parent))
        except DataError as error:
            notes.append(f"Left out: {error}")
    notes += [
        f"{each.place}: no run that counts is done yet, {each.missing} are to come; `peft-mllm study run` goes on."
        for each in found
        if not each.choices
    ]
    own = set[str]().union(*map(_runs, found))
    return [*found, *(each for each in shipped() if not _runs(each) <= own)], notes


def _runs(evidence: Evidence) -> set[str]:
    """By the directories' names, which have the specs' ids: a study that was shipped may be here, too."""
    return {PurePath(run).name for setting in evidence.settings for run in setting.runs}
