"""Where names go beside the circles of a scatter, so that none covers another: pure geometry, in pixels.

y grows downwards, as on a screen. Must not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 15.0  # of a line of text
RINGS = (3, 14, 28, 44)  # distances from a circle that are tried, nearest first


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


@dataclass(frozen=True)
class Label:
    """A text of some width that belongs to a circle."""

    text: str
    x: float
    y: float
    radius: float
    width: float

    def candidates(self) -> list[Box]:
        """Places right, left, above and below the circle, then further away."""
        places = []
        for distance in RINGS:
            gap = self.radius + distance
            middle, half = self.y - HEIGHT / 2, self.width / 2
            for left, top in (
                (self.x + gap, middle),
                (self.x - gap - self.width, middle),
                (self.x - half, self.y - gap - HEIGHT),
                (self.x - half, self.y + gap),
                (self.x + gap / 2, self.y - gap - HEIGHT),
                (self.x + gap / 2, self.y + gap),
                (self.x - gap / 2 - self.width, self.y - gap - HEIGHT),
                (self.x - gap / 2 - self.width, self.y + gap),
            ):
                places.append(Box(left, top, left + self.width, top + HEIGHT))
        return places


def place(
    labels: Sequence[Label], taken: Sequence[Box], width: float, height: float
) -> list[tuple[float, float]]:
    """Left end and middle of each text, inside width × height wherever it fits there.

    One after another: the first candidate that covers nothing, else the one that covers least. `taken` are
    places of other marks.
    """
    covered = [*taken, *(Box(m.x - m.radius, m.y - m.radius, m.x + m.radius, m.y + m.radius) for m in labels)]
    ends = []
    for label in labels:

        def cost(box: Box) -> float:
            outside = Box(0, 0, width, height).overlap(box)
            missing = (box.right - box.left) * (box.bottom - box.top) - outside
            return 10 * missing + sum(box.overlap(other) for other in covered)  # noqa: B023

        best = min(label.candidates(), key=cost)  # the first of equals
        covered.append(best)
        ends.append((best.left, (best.top + best.bottom) / 2))
    return ends
