"""The table of a benchmark's JSON: as Markdown for the README, and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "| workload | method | against | version | ratio (95 %) | bar | pairs | equal to | step: ours, theirs |",
    "|---|---|---|---|---:|---:|---:|---:|---:|",
)


def markdown(found: Mapping[str, Any], *, all_rows: bool = False) -> str:
    """The speed table; without `all_rows` each peer stands with its best micro-batch only."""
    rows = [row for row in found["rows"] if all_rows or row["best"]]
    lines = [*HEAD, *map(_line, rows)]
    return "\n".join([*lines, "", _made(found)])


def as_text(found: Mapping[str, Any]) -> str:
    """All rows, and what they were measured on."""
    return markdown(found, all_rows=True)


def _line(row: Mapping[str, Any]) -> str:
    ratio, memory = row["ratio"], row["kind"] == "memory"
    interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["pairs"] > 1 else ""
    against = {"ablation": f"ours, {row['peer']}"}.get(row["kind"], row["peer"])
    ours, theirs = row["seconds"]
    step = f"{ours / 2**20:.0f}, {theirs / 2**20:.0f} MiB" if memory else f"{ours:.2f}, {theirs:.2f} s"
    cells = (
        row["workload"],
        row["method"],
        against,
        row["version"],
        f"{ratio['median']:.2f}x{interval}",
        _bar(row),
        f"{ratio['pairs']}",
        _equal(row),
        step,
    )
    return f"| {' | '.join(cells)} |"


def _bar(row: Mapping[str, Any]) -> str:
    """What was asked, and whether it is reached."""
    bar, reached = row["bar"], row["ratio"]["median"]
    if bar is None:
        return "-"
    at_most = row["kind"] == "memory"
    met = reached <= bar if at_most else reached >= bar
    return f"{'≤' if at_most else '≥'} {bar:g}x, {'met' if met else 'missed'}"


def _equal(row: Mapping[str, Any]) -> str:
    if row["kind"] == "other semantics":
        return "another training"
    if row["equal"] is None:
        return "-"
    return "every answer" if row["equal"] == 0 else f"{row['equal']:.0e}"


def _made(found: Mapping[str, Any]) -> str:
    """Machine, versions, and how to read it."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "accelerate"))
    return (
        f"Shape `{found['shape']}`, {machine['device']}, threads: {machine['threads']}; {versions}; "
        f"{found['measured']}, {found['finished']}. Ratios of speed are theirs to ours in one process in turns, of "
        "memory ours to theirs; `equal to` is the greatest relative difference of losses and gradients over "
        f"{found['gate']['steps']} steps."
    )
