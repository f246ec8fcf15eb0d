"""Where points are drawn whose own place would hide them, or hide others."""

from collections.abc import Callable
from typing import NamedTuple

from analysis.series import Row
from runners.results.metrics import BITS_PER_WEIGHT, stores_far_more

FAR = 1 / 3  # of the width of all others: a point that is farther to their right would squeeze them
WIDE, HIGH = 0.018, 0.024  # of a panel: points that are closer than this in both directions cover each other
MOST_STEPS = 2  # to either side,
MOST_MOVED = 0.09  # in bits per weight: a point must stay near what it stores


class Place(NamedTuple):
    """A point in the units of its axes."""

    x: float
    y: float


def far_right(rows: list[Row]) -> list[Row]:
    """The series that store far more than the bits that they were asked for, and so lie far to the right of all others.

    SpQR at 2 bits, for instance, may keep so many outliers that it stores 9 bits per weight.
    """
    others = [row[BITS_PER_WEIGHT] for row in rows if not stores_far_more(row)]
    if not others:
        return []
    limit = max(others) + FAR * (max(others) - min(others))
    return [row for row in rows if stores_far_more(row) and row[BITS_PER_WEIGHT] > limit]


def apart(
    places: list[Place],
    across: tuple[float, float],
    along: tuple[float, float],
    scale: Callable[[float], float] = float,
) -> list[Place]:
    """The places, of which those that would cover an earlier one are moved sideways, by the least number of steps.

    Args:
        places: the points.
        across: the limits of the x axis.
        along: the limits of the y axis.
        scale: `math.log` for a logarithmic y axis.
    """
    width, height = across[1] - across[0], scale(along[1]) - scale(along[0])
    steps = min(MOST_STEPS, int(MOST_MOVED / (WIDE * width)))
    taken: list[Place] = []
    for place in places:
        moves = [side * step * WIDE * width for step in range(steps + 1) for side in (1, -1)]
        tried = [Place(place.x + move, place.y) for move in moves]
        tried = [spot for spot in tried if across[0] + WIDE * width <= spot.x <= across[1] - WIDE * width]
        free = (
            spot
            for spot in tried
            if all(
                # not quite a whole step: two points that are one step apart are free of each other
                abs(spot.x - other.x) >= 0.99 * WIDE * width or abs(scale(spot.y) - scale(other.y)) >= HIGH * height
                for other in taken
            )
        )
        taken.append(next(free, place))
    return taken
