"""Byte ranges of a file, each (begin, end) with end excluded. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Range = tuple[int, int]


def total(ranges: Iterable[Range]) -> int:
    """Bytes in disjoint ranges."""
    return sum(end - begin for begin, end in ranges)


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as sorted ranges that neither overlap nor touch."""
    found: list[Range] = []
    for begin, end in sorted(one for one in ranges if one[0] < one[1]):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def without(ranges: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
    """What of ``ranges`` is not in ``taken``; both sorted and disjoint."""
    found: list[Range] = []
    skip = 0
    for begin, end in ranges:
        while skip < len(taken) and taken[skip][1] <= begin:
            skip += 1
        for number in range(skip, len(taken)):
            if taken[number][0] >= end:
                break
            if begin < taken[number][0]:
                found.append((begin, taken[number][0]))
            begin = max(begin, taken[number][1])
        if begin < end:
            found.append((begin, end))
    return found


def bridged(ranges: Sequence[Range], spare: int) -> list[Range]:
    """Fewer ranges, from sorted and disjoint ones: the smallest gaps are closed first, for ``spare`` bytes at most."""
    gaps = sorted((right[0] - left[1], left[1]) for left, right in pairwise(ranges))
    closed: set[int] = set()
    for size, begin in gaps:
        if size > spare:
            break
        spare -= size
        closed.add(begin)
    found: list[Range] = []
    for begin, end in ranges:
        if found and found[-1][1] in closed:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def pieces(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """The same ranges, none longer than ``size``."""
    for begin, end in ranges:
        for start in range(begin, end, size):
            yield start, min(start + size, end)
