"""Pareto fronts of a block: the lines that no other beats in both of two figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft_mllm.study.analysis import Front, Line
from peft_mllm.study.contest import Contest
from peft_mllm.study.inference.pareto import Better, pareto

FIGURES: Mapping[str, Better] = {
    "score": "more",
    "gain": "more",
    "forgotten": "less",
    "trainable": "less",
    "seconds": "less",
    "memory": "less",
    "disk": "less",
    "flops": "less",
    "hallucination": "less",
    "robustness": "more",
}
"""Which way each figure is better."""
PAIRS = (
    ("trainable", "score"),
    ("seconds", "score"),
    ("disk", "score"),
    ("memory", "score"),
    ("flops", "score"),
    ("forgotten", "gain"),
)
"""x and y."""


def fronts_of(contests: Sequence[Contest], lines: Sequence[Line]) -> tuple[Front, ...]:
    """The fronts of each block that has two lines with both figures."""
    return tuple(front for contest in contests for front in _of(contest, lines))


def _of(contest: Contest, lines: Sequence[Line]) -> Iterator[Front]:
    for x, y in PAIRS:
        points = {str(place): (figure(lines[place], x), figure(lines[place], y)) for place in contest.members}
        if sum(None not in point for point in points.values()) > 1:
            found = pareto(points, better=(FIGURES[x], FIGURES[y]))
            yield Front(x, y, contest.factors, tuple(map(int, found.names)))


def figure(line: Line, name: str) -> float | None:
    """One of `FIGURES` of a line; None where it is not known."""
    estimates = {"score": line.score, "gain": line.gain, "forgotten": line.forgotten}
    if name in estimates:
        found = estimates[name]
        return found.value if found else None
    if name in ("hallucination", "robustness"):
        return line.hallucination if name == "hallucination" else line.robustness
    return line.figures.get(name)
