"""The shapes under which NVFP4 weights and their block scales occur on disk. Integers only, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

ROW_TILE = 128
COLUMN_TILE = 4
_PAD = 16
PANEL = 128
"""Columns of a panel of GPTQ's compensation (``formats/nvfp4/gptq.py``)."""


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is not below ``count``."""
    return -(-count // multiple) * multiple


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of [rows, columns] scales in the 128x4 order: rows to 128, columns to 4."""
    return round_up(rows, ROW_TILE), round_up(columns, COLUMN_TILE)


@dataclass(frozen=True, slots=True)
class ScaleShape:
    """One way in which scales may lie in a file.

    Attributes:
        stored: The tensor's shape.
        grid: Rows and columns of scales in it, padding included.
        swizzled: Whether the scales are in the 128x4 order.
    """

    stored: tuple[int, ...]
    grid: tuple[int, int]
    swizzled: bool


def scale_shapes(rows: int, columns: int) -> Iterator[ScaleShape]:
    """Every way in which [rows, columns] scales are known to occur."""
    # Without padding; ModelOpt's padding_strategy "row"; and "row_col", which pads the scale columns to 16 entries.
    padded_rows, padded_columns = round_up(rows, _PAD), round_up(columns, _PAD)
    for grid in dict.fromkeys(((rows, columns), (padded_rows, columns), (padded_rows, padded_columns))):
        yield ScaleShape(grid, grid, False)
        yield ScaleShape(padded_shape(*grid), padded_shape(*grid), True)
    height, width = padded_shape(rows, columns)
    yield ScaleShape((height * width,), (height, width), True)  # flat: flashinfer's block_scale_interleave
    yield ScaleShape((height // 4, width * 4), (height, width), True)  # torchao: (32*ceil(N/128), 16*ceil(K/64))


def packed_shapes(rows: int, columns: int) -> set[tuple[int, int]]:
    """Shapes of the packed codes of an [N, K] weight: rows as they are or padded to 16, columns to 16 bytes."""
    half = columns // 2
    return {(height, width) for height in (rows, round_up(rows, _PAD)) for width in (half, round_up(half, _PAD))}


def num_stored(columns: int) -> int:
    """How many values GPTQ's compensation of so many columns has: each panel ends at its own last row."""
    whole = columns // PANEL
    return PANEL * PANEL * whole * (whole + 1) // 2 + columns % PANEL * columns
