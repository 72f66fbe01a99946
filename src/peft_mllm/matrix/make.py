"""Making a matrix: which candidates and tiny models are asked for, and the files that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from peft_mllm.errors import MethodError, ModelError
from peft_mllm.files import atomic_write, disk_errors
from peft_mllm.matrix.candidates import Candidate, candidates
from peft_mllm.matrix.members import members
from peft_mllm.matrix.page import page
from peft_mllm.matrix.probes import PROBES
from peft_mllm.matrix.result import Matrix, installed
from peft_mllm.matrix.runner import Name, probe
from peft_mllm.screen import Screen
from peft_mllm.shelf import did_you_mean

JOURNAL, MATRIX, PAGE = "pairs.jsonl", "matrix.json", "matrix.md"
QUICK = ("lora", "prefix")
"""With --quick these are tried on every model, and everything else on the first alone."""


def make_matrix(
    output: Path,
    *,
    methods: Sequence[str] = (),
    families: Sequence[str] = (),
    jobs: int,
    quick: bool = False,
    quiet: bool = False,
) -> Matrix:
    """Try methods on tiny models, and write matrix.json and matrix.md; a call that was stopped goes on.

    Args:
        output: directory.
        methods: names of methods (with all their variants), of candidates, or of peft's types; all if empty.
        families: names of tiny models; all if empty.
        jobs: worker processes.
        quick: leave most pairs out.
        quiet: show no progress.

    Raises:
        UserError: an unknown name, or a directory that cannot be written.
    """
    rows, columns = chosen_candidates(methods), chosen_members(families)
    names: list[Name] = [
        (row, column) for column in columns for row in rows if not quick or column == columns[0] or row in QUICK
    ]
    with disk_errors(output, "the matrix into"):
        output.mkdir(parents=True, exist_ok=True)
        tried = probe(names, output / JOURNAL, jobs=jobs, screen=Screen(quiet=quiet))
    facts = {pair.member: fact for pair, fact in tried if fact}
    by_row = {row: number for number, row in enumerate(rows)}
    made = Matrix(
        made=datetime.now(UTC).date().isoformat(),
        versions=installed(),
        probes={name: (probe.__doc__ or "").strip() for name, probe in PROBES.items()},
        candidates={name: {"method": each.method, "marks": dict(each.marks)} for name, each in rows.items()},
        members={name: facts.get(name, {"family": "", "model_type": ""}) for name in columns},
        pairs=tuple(sorted((pair for pair, _ in tried), key=lambda pair: by_row[pair.candidate])),
    )
    made.write(output / MATRIX)
    atomic_write(output / PAGE, page(made), what="the page")
    return made


def chosen_candidates(words: Sequence[str]) -> dict[str, Candidate]:
    """The candidates that words stand for, in their own order.

    Raises:
        MethodError: a word stands for none.
    """
    every = candidates()
    if not words:
        return every
    chosen: set[str] = set()
    for word in words:
        meant = {name for name, each in every.items() if word in (name, each.method, each.marks.get("type"))}
        if not meant:
            raise MethodError(f"There is no method or type of peft '{word}'. {did_you_mean(word, list(every))}")
        chosen |= meant
    return {name: each for name, each in every.items() if name in chosen}


def chosen_members(words: Sequence[str]) -> list[str]:
    """The tiny models of these names.

    Raises:
        ModelError: there is none of a name.
    """
    every = members()
    for word in words:
        if word not in every:
            raise ModelError(f"There is no tiny model '{word}'. {did_you_mean(word, every)}")
    return [name for name in every if not words or name in words]
