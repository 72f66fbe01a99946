"""From values to places on an axis, and which values are written along it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST = 1e-12
"""Room at an axis' end; less is lost in rounding."""
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; logarithmic ones keep the exponents."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        bent = math.log10(value) if self.logarithmic else value
        return (bent - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round values, about so many."""
        return self._powers(most) if self.logarithmic else _between(self.low, self.high, most)

    def _powers(self, most: int) -> list[float]:
        low, high = math.floor(self.low), math.ceil(self.high)
        for factors in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            places = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
            found = [value for value in places if value > 0 and self.low <= math.log10(value) <= self.high]
            if len(found) <= most + 1:
                return found
        step = math.ceil((high - low) / most)
        return [10.0**power for power in range(low, high + 1, step) if self.low <= power <= self.high]


def scale_of(values: Iterable[float], *, logarithmic: bool = False, room: float = 0.06, zero: bool = False) -> Scale:
    """The axis that holds all values.

    Args:
        values: finite; logarithmic ones above 0, or the axis is not logarithmic.
        logarithmic: whether they differ by powers of ten.
        room: left free at both ends, as a share of the axis.
        zero: whether the axis begins at 0.
    """
    known = [value for value in values if math.isfinite(value)]
    log = logarithmic and bool(known) and min(known) > 0
    bent = [math.log10(value) if log else value for value in known] or [0.0, 1.0]
    low, high = min(bent), max(bent)
    free = next((each for each in ((high - low) * room, abs(high) * 0.1) if each > LEAST), 1.0)
    return Scale(0.0 if zero else low - free, high + free, log)


def written(value: float) -> str:
    """A tick's figure."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _between(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in STEPS if factor * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) + 0.0 for place in range(first, math.floor(high / step + 1e-9) + 1)]
