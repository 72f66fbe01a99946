"""The figures of a line that a reader may set against one another, each with its direction and its wording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft_mllm.study import wording
from peft_mllm.study.analysis import Line


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        name: as in `Front.x`.
        words: for a reader.
        of: a line's; None where it is not known.
        text: with its unit.
        more: whether more is better.
        scored: in the headline's unit.
        logarithmic: differs by powers of ten.
        difference: of two scores.
        unit: of the bare number, where it is not the headline's.
    """

    name: str
    words: str
    of: Callable[[Line], float | None]
    text: Callable[[float], str]
    more: bool = False
    scored: bool = False
    logarithmic: bool = False
    difference: bool = False
    unit: str = ""

    def title(self, unit: str) -> str:
        """For an axis or a heading; `unit` is the headline's."""
        named = {"%": "points"}.get(unit, unit) if self.difference else unit
        return f"{self.words} ({named})" if self.scored and named else self.words

    def plain_title(self, unit: str) -> str:
        """For an axis with bare numbers."""
        return f"{self.words} ({self.unit})" if self.unit else self.title(unit)


def flops(value: float) -> str:
    """`3.2e15` as a person reads it."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{wording.GLUE}{unit}FLOP"
    return f"{value:.3g}{wording.GLUE}FLOP"


def _figure(name: str) -> Callable[[Line], float | None]:
    return lambda line: line.figures.get(name)


def _count(value: float) -> str:
    return wording.count(round(value)).replace(".0", "")


def _size(value: float) -> str:
    return wording.size(round(value)) if value else "0"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("score", "score", lambda line: line.score.value if line.score else None, wording.figure,
                more=True, scored=True),
        Measure("gain", "gain over zero-shot", lambda line: line.gain.value if line.gain else None, wording.figure,
                more=True, scored=True, difference=True),
        Measure("forgotten", "forgotten on seen tasks",
                lambda line: line.forgotten.value if line.forgotten else None, wording.figure,
                scored=True, difference=True),
        Measure("seen", "seen tasks", lambda line: line.seen, wording.figure, more=True, scored=True),
        Measure("sd", "SD over seeds", lambda line: line.sd, wording.figure, scored=True, difference=True),
        Measure("hallucination", "hallucination", lambda line: line.hallucination, wording.figure),
        Measure("robustness", "robustness", lambda line: line.robustness, wording.figure,
                more=True, scored=True, difference=True),
        Measure("trainable", "trainable parameters", _figure("trainable"), _count, logarithmic=True),
        Measure("disk", "size on disk", _figure("disk"), _size, logarithmic=True, unit="bytes"),
        Measure("flops", "FLOPs of training", _figure("flops"), flops),
        Measure("flops_paper", "FLOPs by the paper's formula", _figure("flops_paper"), flops),
        Measure("seconds", "training time", _figure("seconds"), wording.duration, unit="s"),
        Measure("seconds_scoring", "time of scoring", _figure("seconds_scoring"), wording.duration,
                unit="s"),
        Measure("memory", "peak memory", _figure("memory"), _size, unit="bytes"),
    )
}  # fmt: skip
"""By name, in the order of tables."""
