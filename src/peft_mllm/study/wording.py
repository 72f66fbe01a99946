"""Figures as a person reads them; tables, page and conclusion all take their wording from here."""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.files import size_in_words
from peft_mllm.study.statistics import Estimate

NOTHING = "\N{EN DASH}"
"""Stands in a cell where there is no figure."""

MINUS = "\N{MINUS SIGN}"

GLUE = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, which must not part at the end of a line."""


def figure(value: float | None, *, signed: bool = False) -> str:
    """A score or a difference with one decimal; `signed` puts a plus before a gain."""
    if value is None:
        return NOTHING
    rounded = round(value, 1) + 0.0  # no "-0.0"
    text = f"{rounded:+.1f}" if signed and rounded else f"{rounded:.1f}"
    return text.replace("-", MINUS)


def interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """`91.0 to 95.6`, or nothing where the limits are not known."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{figure(estimate.low, signed=signed)} to {figure(estimate.high, signed=signed)}"


def count(number: int) -> str:
    """`614 k`, `20.1 M`: a number of parameters."""
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            value = number / size
            return f"{value:.0f}{GLUE}{unit}" if value >= 100 else f"{value:.1f}{GLUE}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """`21 s`, `3 min 5 s`, `2 h 10 min`."""
    if not seconds:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f}{GLUE}s" if seconds >= 10 else f"{seconds:.1f}{GLUE}s"
    minutes, rest = divmod(round(seconds), 60)
    words = f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return words.replace(" ", GLUE)


def size(number: int) -> str:
    """Bytes: `1.5 MB`."""
    return size_in_words(number).replace(" ", GLUE) if number else NOTHING


def and_list(words: Sequence[str], *, most: int = 4) -> str:
    """`a, b and c`; of a long list the first, and how many more."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
