"""How methods are drawn: each has the same colour and marker in every figure and table.

All colours have a contrast of at least 3 : 1 on the light page and on the dark, and no two methods differ by
colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2f7fd1", "#d95f1e", "#159a6c", "#b565c9", "#b8860b", "#d4508f", "#1c94a6", "#7a6fd6")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
"""matplotlib's markers, each with the character that looks like it, for the page's legend."""
NEUTRAL = "#8a8f98"
"""Of what is no method: zero-shot."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        """The marker as a character."""
        return MARKERS[self.marker]


BARE = Look(NEUTRAL, "o")


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Colour and marker of each method, in the order of first appearance."""
    markers = tuple(MARKERS)
    return {
        method: Look(COLOURS[i % len(COLOURS)], markers[i % len(markers)])
        for i, method in enumerate(dict.fromkeys(methods))
    }
