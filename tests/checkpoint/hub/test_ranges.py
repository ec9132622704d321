"""Arithmetic of byte ranges, against sets of bytes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from modelopt_convert.checkpoint.hub.ranges import Range, bridged, pieces, total, union, without

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=8
)


def as_bytes(ranges: list[Range]) -> set[int]:
    return {byte for begin, end in ranges for byte in range(begin, end)}


@given(RANGES)
def test_union_has_the_same_bytes_and_no_two_that_touch(ranges: list[Range]) -> None:
    found = union(ranges)
    assert as_bytes(found) == as_bytes(ranges) and total(found) == len(as_bytes(ranges))
    assert all(left[1] < right[0] for left, right in pairwise(found))


@given(RANGES, RANGES)
def test_without_takes_away(ranges: list[Range], taken: list[Range]) -> None:
    found = without(union(ranges), union(taken))
    assert as_bytes(found) == as_bytes(ranges) - as_bytes(taken)
    assert total(found) == len(as_bytes(found)) and found == sorted(found)


@given(RANGES, st.integers(0, 40))
def test_bridges_cost_no_more_than_is_spared(ranges: list[Range], spare: int) -> None:
    before = union(ranges)
    found = bridged(before, spare)
    assert as_bytes(found) >= as_bytes(before) and total(found) - total(before) <= spare
    gaps = [right[0] - left[1] for left, right in pairwise(found)]
    assert not gaps or min(gaps) > spare - (total(found) - total(before))  # no gap is left that could be closed


@given(RANGES, st.integers(1, 20))
def test_pieces_are_short_and_the_same_bytes(ranges: list[Range], size: int) -> None:
    before = union(ranges)
    found = list(pieces(before, size))
    assert as_bytes(found) == as_bytes(before) and total(found) == total(before)
    assert all(0 < end - begin <= size for begin, end in found)
