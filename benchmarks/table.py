"""The table of a benchmark's JSON: as Markdown for the README, and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "| workload | method | against | version | ratio (95 %) | bar | pairs | equal to | step: ours, theirs |",
    "|---|---|---|---|---:|---:|---:|---:|---:|",
)

ABOUT = (
    "How many times as long as ours a training step of another trainer takes, on the same samples with equal losses "
    "and gradients; of memory, how much of theirs ours takes. The model is a random LLaVA of width 512 on one CPU "
    "core, in the proportions of a 7B model. Sharing an image among its questions is the largest part, and where "
    "each image has but one question, there is nothing to share. `make bench` renews this table in some 15 minutes; "
    "[docs/speed.md](docs/speed.md) says how it is measured, and [benchmarks/](benchmarks/README.md) has the code."
)
WHY = "docs/speed.md says where the time goes."


def markdown(found: Mapping[str, Any], *, all_rows: bool = False) -> str:
    """The speed table; without `all_rows` each peer stands with its best micro-batch only."""
    rows = [row for row in found["rows"] if all_rows or row["best"]]
    lines = [*HEAD, *map(_line, rows)]
    equal = (
        "`equal to` is the greatest relative difference of losses and gradients over "
        f"{found['gate']['steps']} steps on the shape `{found['gate']['shape']}`."
    )
    return "\n".join([*lines, "", f"{_made(found)} {equal}"])


def as_text(found: Mapping[str, Any]) -> str:
    """All rows, and what they were measured on."""
    return markdown(found, all_rows=True)


def section(found: Mapping[str, Any]) -> str:
    """README's section: what was asked for and what is reached, each peer with its best micro-batch."""
    rows = [row for row in found["rows"] if row["best"] and row["bar"] is not None]
    lines = ["| workload | method | against | ratio (95 %) | asked for |", "|---|---|---|---:|---:|"]
    for row in rows:
        cells = row["workload"], row["method"], f"{row['peer']} ({row['version']})", _ratio(row), _bar(row)
        lines.append(f"| {' | '.join(cells)} |")
    missed = sum(not _met(row) for row in rows)
    total = f"{missed} of these {len(rows)} are missed" if missed else f"All {len(rows)} are met"
    apart = max((row["equal"] for row in rows if row["equal"] is not None), default=0.0)
    equal = f"Losses and gradients differ by {apart:.0e} at most, relative, over {found['gate']['steps']} steps."
    return "\n".join(["## Speed", "", ABOUT, "", *lines, "", f"{total}; {WHY}", "", f"{_made(found)} {equal}"])


def _line(row: Mapping[str, Any]) -> str:
    memory = row["kind"] == "memory"
    against = {"ablation": f"ours, {row['peer']}"}.get(row["kind"], row["peer"])
    ours, theirs = row["seconds"]
    step = f"{ours / 2**20:.0f}, {theirs / 2**20:.0f} MiB" if memory else f"{ours:.2f}, {theirs:.2f} s"
    cells = (
        row["workload"],
        row["method"],
        against,
        row["version"],
        _ratio(row),
        _bar(row),
        f"{row['ratio']['pairs']}",
        _equal(row),
        step,
    )
    return f"| {' | '.join(cells)} |"


def _ratio(row: Mapping[str, Any]) -> str:
    """With its interval, where there are several pairs."""
    ratio = row["ratio"]
    interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["pairs"] > 1 else ""
    return f"{ratio['median']:.2f}x{interval}"


def _bar(row: Mapping[str, Any]) -> str:
    """What was asked, and whether it is reached."""
    if row["bar"] is None:
        return "-"
    return f"{'≤' if row['kind'] == 'memory' else '≥'} {row['bar']:g}x, {'met' if _met(row) else 'missed'}"


def _met(row: Mapping[str, Any]) -> bool:
    reached: float = row["ratio"]["median"]
    return reached <= row["bar"] if row["kind"] == "memory" else reached >= row["bar"]


def _equal(row: Mapping[str, Any]) -> str:
    if row["kind"] == "other semantics":
        return "another training"
    if row["equal"] is None:
        return "-"
    if row["kind"] == "together":
        return "every byte"
    return "every answer" if row["equal"] == 0 else f"{row['equal']:.0e}"


def _made(found: Mapping[str, Any]) -> str:
    """Machine, versions, and how to read it."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "accelerate"))
    return (
        f"Shape `{found['shape']}`, {machine['device']}, threads: {machine['threads']}; {versions}; "
        f"{found['measured']}, {found['finished']}. Ratios of speed are theirs to ours in one process in turns, of "
        "memory ours to theirs."
    )
