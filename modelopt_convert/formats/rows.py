"""Which rows of a weight are looked at. Pure, no torch."""

import itertools

SAMPLED_ROWS = 16


def sample_rows(num_rows: int, count: int) -> list[int]:
    """Row indices spread over the tensor, the first and the last always among them; the same on every run.

    One index is taken from each of ``count`` equal strips, at a position that shifts from strip to strip. So the rows
    lie in different tiles of 128 rows, and at different places within a tile: that tells the scale orders apart.
    """
    if num_rows <= count + 2:
        return list(range(num_rows))
    edges = [strip * num_rows // count for strip in range(count + 1)]
    inner = [low + (37 * strip + 17) % (high - low) for strip, (low, high) in enumerate(itertools.pairwise(edges))]
    return sorted({0, *inner, num_rows - 1})
