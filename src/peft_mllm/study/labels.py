"""Where to write names beside points so that none covers a point, a bar or another name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HEIGHT = 11.0
"""Of a line of text, in points of print."""
WIDTH = 6.0
"""Of a letter, on average."""


@dataclass(frozen=True)
class Box:
    """A rectangle that is taken: a marker, an error bar, a name."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        across = min(self.right, other.right) - max(self.left, other.left)
        up = min(self.high, other.high) - max(self.low, other.low)
        return max(0.0, across) * max(0.0, up)


def place_beside(
    names: Sequence[str], points: Sequence[tuple[float, float]], taken: Sequence[Box], frame: Box
) -> list[tuple[float, float]]:
    """The lower left corner of each name: near its point, where it covers least.

    Args:
        names: what is written.
        points: where each belongs, in points of print.
        taken: what must not be covered.
        frame: the area to stay in.
    """
    boxes, corners = list(taken), []
    for name, point in zip(names, points, strict=True):
        chosen = min(_around(point, WIDTH * len(name)), key=lambda box: _cost(box, boxes, frame))
        boxes.append(chosen)
        corners.append((chosen.left, chosen.low))
    return corners


def spread(heights: Sequence[float]) -> list[float]:
    """Move heights up, as little as it takes, so that lines of text at them do not overlap."""
    moved = list(heights)
    ceiling = float("-inf")
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        moved[index] = max(heights[index], ceiling)
        ceiling = moved[index] + HEIGHT
    return moved


def _around(point: tuple[float, float], width: float) -> Iterator[Box]:
    """Places for a name, the preferred first: right above, left above, above; below; then further away."""
    x, y = point
    for away in (4.0, 14.0, 24.0):
        for low in (y + away, y - away - HEIGHT):
            for left in (x + 5, x - 5 - width, x - width / 2):
                yield Box(left, low, left + width, low + HEIGHT)


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Area covered, and area outside the frame."""
    outside = (box.right - box.left) * (box.high - box.low) - box.overlap(frame)
    return outside + sum(box.overlap(other) for other in taken)
