"""Which units to keep in BF16, if errors add up: the frontier of bytes and error, and the best choice within bytes.

Pure. Errors are added as fractions of integers, so that equal sums are equal in any order.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import fsum, lcm


@dataclass(frozen=True, slots=True)
class Item:
    """A unit as a choice.

    Attributes:
        name: Of the unit.
        error: What packing it adds to the error; finite, not negative.
        cost: Bytes that keeping it adds.
    """

    name: str
    error: float
    cost: int


@dataclass(frozen=True, slots=True)
class Point:
    """One choice.

    Attributes:
        keeps: Names of the units that are kept, in the order in which they were given.
        cost: Bytes that this adds.
        error: The sum of the errors of all others.
    """

    keeps: tuple[str, ...]
    cost: int
    error: float


def point_of(items: Sequence[Item], keeps: Iterable[str]) -> Point:
    """The choice that keeps these units."""
    kept = frozenset(keeps)
    return Point(
        tuple(item.name for item in items if item.name in kept),
        sum(item.cost for item in items if item.name in kept),
        fsum(item.error for item in items if item.name not in kept),
    )


def frontier(items: Sequence[Item]) -> tuple[Point, ...]:
    """Every choice that no mixture of others beats: the lower hull of (bytes, error), from none kept to all.

    Between two of its points lie those of the fractional knapsack, so units are kept by error for each byte, the
    largest first (Dantzig 1957). What adds no bytes is kept by all.

    Args:
        items: The units.
    """
    always = [item.name for item in items if item.cost <= 0]
    order = _by_density(item for item in items if item.cost > 0)
    return tuple(point_of(items, [*always, *(one.name for one in order[:count])]) for count in range(len(order) + 1))


def best_within(items: Sequence[Item], capacity: int) -> Point | None:
    """The choice of the least error among those that add no more than so many bytes; None if there is none.

    The knapsack problem, solved exactly: a table over the sizes that there are, where of one size those with the
    largest errors are kept. A state is left out if another takes no more bytes for no more error, or if it cannot reach
    the best that is known even with parts of units (the bound of the fractional knapsack).

    Args:
        items: The units.
        capacity: Bytes that the choice may add.
    """
    always = [item for item in items if item.cost <= 0]
    room = capacity - sum(item.cost for item in always)
    if room < 0:
        return None
    order = _by_density(item for item in items if item.cost > 0)
    gains = _integers(order)
    sizes: dict[int, list[Item]] = {}
    for item in sorted(order, key=lambda item: -gains[item.name]):
        sizes.setdefault(item.cost, []).append(item)
    left, states, best = order, [_State(0, 0, None, ())], 0
    for size in sorted(sizes, reverse=True):
        left = [item for item in left if item.cost != size]
        bound = _Bound(left, gains)
        reached = [0, *accumulate(gains[item.name] for item in sizes[size])]
        grown: list[tuple[_State, int, int]] = []
        for state in states:
            for count in range(min(len(sizes[size]), (room - state.cost) // size) + 1):
                one = _State(state.cost + count * size, state.gain + reached[count], state, tuple(sizes[size][:count]))
                surely, at_most = bound.of(room - one.cost)
                best = max(best, one.gain + surely)
                grown.append((one, one.gain + at_most, one.gain))
        states, most = [], -1
        for one, at_most, gain in sorted(grown, key=lambda found: (found[0].cost, -found[2])):
            if at_most >= best and gain > most:
                states.append(one)
                most = gain
    last = max(states, key=lambda state: state.gain)
    return point_of(items, [*(item.name for item in always), *last.names()])


def first_reaching(points: Sequence[Point], reaches: Callable[[Point], bool]) -> Point | None:
    """The first point of a frontier that reaches something which later ones reach too; None if the last does not.

    Args:
        points: Of the frontier, by bytes.
        reaches: Measures a point; is asked for as few as it takes to halve what is left again and again.
    """
    low, high = 0, len(points) - 1
    if high < 0 or not reaches(points[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(points[middle]) else (middle + 1, high)
    return points[high]


@dataclass(frozen=True, slots=True)
class _State:
    """Some units of the sizes so far that are kept."""

    cost: int
    gain: int
    before: "_State | None"
    kept: tuple[Item, ...]

    def names(self) -> list[str]:
        found: list[str] = []
        state: _State | None = self
        while state is not None:
            found += [item.name for item in state.kept]
            state = state.before
        return found


class _Bound:
    """What units can gain within a number of bytes: surely, and at most."""

    def __init__(self, items: Sequence[Item], gains: Mapping[str, int]) -> None:
        """Sum up.

        Args:
            items: By density.
            gains: Of each.
        """
        self._items = [(item.cost, gains[item.name]) for item in items]
        self._costs = [0, *accumulate(cost for cost, _ in self._items)]
        self._gains = [0, *accumulate(gain for _, gain in self._items)]

    def of(self, room: int) -> tuple[int, int]:
        """The gain of whole units in the order of density, and that with a part of the next, rounded up."""
        count = bisect_right(self._costs, room) - 1
        surely = self._gains[count]
        if count == len(self._items):
            return surely, surely
        cost, gain = self._items[count]
        return surely, surely - (-gain * (room - self._costs[count]) // cost)


def _by_density(items: Iterable[Item]) -> list[Item]:
    """By error for each byte, the largest first; of equal ones in the order in which they were given."""
    return sorted(items, key=lambda item: -Fraction(item.error) / item.cost)


def _integers(items: Iterable[Item]) -> dict[str, int]:
    """Errors as whole numbers of one unit, exactly: a float is a fraction."""
    exact = {item.name: Fraction(item.error) for item in items}
    whole = lcm(*(one.denominator for one in exact.values()))
    return {name: int(one * whole) for name, one in exact.items()}
