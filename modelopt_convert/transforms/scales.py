"""The 128x4 ("swizzled") order of block scales that GEMM kernels read.

cuBLAS documents it under "1D block scaling factors layout"; flashinfer calls it SfLayout.layout_128x4.
"""

import torch
from torch import Tensor

ROW_TILE = 128
COLUMN_TILE = 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of [rows, columns] scales in the 128x4 order: rows to 128, columns to 4."""
    return -(-rows // ROW_TILE) * ROW_TILE, -(-columns // COLUMN_TILE) * COLUMN_TILE


def unswizzle_128x4(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Bring scales from the 128x4 order into row-major order and cut the padding.

    Within each tile of 128 rows and 4 columns, the scale of row r, column c lies at (r % 32) * 16 + (r // 32) * 4 + c.

    Args:
        swizzled: Any dtype of one byte, ``padded_shape(rows, columns)`` elements in any shape.
        rows: N.
        columns: K/16.

    Returns:
        [rows, columns], contiguous.

    Raises:
        ValueError: The number of elements is not that of the padded shape.
    """
    padded_rows, padded_columns = padded_shape(rows, columns)
    if swizzled.numel() != padded_rows * padded_columns:
        raise ValueError(
            f"[{rows}, {columns}] scales take {padded_rows * padded_columns} bytes, found {swizzled.numel()}"
        )
    tiles = swizzled.reshape(-1).view(torch.uint8)
    tiles = tiles.view(padded_rows // ROW_TILE, padded_columns // COLUMN_TILE, 32, 4, COLUMN_TILE)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return linear[:rows, :columns].contiguous().view(swizzled.dtype)
