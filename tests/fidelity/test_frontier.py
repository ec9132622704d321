"""The knapsack against all subsets, and the frontier against every choice."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.fidelity.frontier import Item, Point, best_within, first_reaching, frontier, point_of

# Few sizes, as units have; errors of any size, and equal ones.
ITEMS = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 1e3), st.sampled_from((0.0, 0.5, 1e-30, 1e30))), st.sampled_from((-3, 0, 5, 7, 19, 20))
    ),
    max_size=9,
).map(lambda found: [Item(f"u{number}", error, cost) for number, (error, cost) in enumerate(found)])


def subsets(items: list[Item]) -> list[Point]:
    names = [item.name for item in items]
    return [point_of(items, keeps) for count in range(len(names) + 1) for keeps in combinations(names, count)]


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, capacity=st.integers(-8, 120))
def test_the_best_choice_is_that_of_all_subsets(items: list[Item], capacity: int) -> None:
    fitting = [one for one in subsets(items) if one.cost <= capacity]
    found = best_within(items, capacity)
    if not fitting:
        assert found is None
        return
    assert found is not None and found.cost <= capacity
    assert found.error == pytest.approx(min(one.error for one in fitting), rel=1e-12)
    assert found == point_of(items, found.keeps)


@settings(max_examples=80, deadline=None)
@given(items=ITEMS)
def test_no_mixture_of_choices_beats_the_frontier(items: list[Item]) -> None:
    points = frontier(items)
    every = subsets(items)
    assert points[0].cost == min(one.cost for one in every) and points[-1].error == pytest.approx(0.0)
    for left, right in pairwise(points):
        assert left.cost < right.cost and left.error >= right.error and set(left.keeps) < set(right.keeps)
        width = right.cost - left.cost
        for one in every:
            if left.cost <= one.cost <= right.cost:
                line = left.error + (right.error - left.error) * (one.cost - left.cost) / width
                assert one.error >= line * (1 - 1e-9) - 1e-9 * left.error


def test_more_room_is_no_worse_and_the_frontier_is_reached() -> None:
    items = [Item(f"u{number}", float(number * number % 17), (5, 7, 19)[number % 3]) for number in range(40)]
    best = [best_within(items, capacity) for capacity in range(0, sum(item.cost for item in items) + 1, 3)]
    errors = [one.error for one in best if one is not None]
    assert errors == sorted(errors, reverse=True) and len(errors) == len(best) and errors[-1] == 0.0
    for point in frontier(items):
        reached = best_within(items, point.cost)
        assert reached is not None and reached.error == point.error


def test_a_unit_that_does_harm_is_kept_however_little_room_there_is() -> None:
    items = [Item("harmful", 1e6, 20), *(Item(f"u{number}", 1.0, 20) for number in range(30))]
    found = best_within(items, 20)
    assert found is not None and found.keeps == ("harmful",)
    assert frontier(items)[1].keeps == ("harmful",)


def test_five_hundred_units_of_six_sizes_take_no_time() -> None:
    """The states would be 80 ** 6 without what is left out."""
    sizes = (5308424, 21233672, 15728648, 15925288, 77777, 123456)
    items = [
        Item(f"u{number}", ((number * 2654435761) % 1000 + 1) ** 3 / 1e9, sizes[number % 6]) for number in range(500)
    ]
    room = sum(item.cost for item in items) // 3
    found, hull = best_within(items, room), frontier(items)
    below = max((one for one in hull if one.cost <= room), key=lambda one: one.cost)
    above = hull[hull.index(below) + 1]
    share = (room - below.cost) / (above.cost - below.cost)
    assert found is not None and found.cost <= room
    assert below.error - share * (below.error - above.error) <= found.error * (1 + 1e-12) <= below.error * (1 + 1e-9)


@given(count=st.integers(0, 40), first=st.integers(0, 50))
def test_the_first_point_that_reaches_is_found_by_halving(count: int, first: int) -> None:
    points = [Point((), number, 0.0) for number in range(count)]
    asked: list[int] = []

    def reaches(point: Point) -> bool:
        asked.append(point.cost)
        return point.cost >= first

    found = first_reaching(points, reaches)
    assert (found.cost if found is not None else None) == (first if first < count else None)
    assert len(asked) <= 7
