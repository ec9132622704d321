"""The 128x4 ("swizzled") order of block scales that GEMM kernels read.

cuBLAS documents the order under "1D block scaling factors layout"; flashinfer calls it SfLayout.layout_128x4.
"""

import torch
from torch import Tensor

from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.shapes import COLUMN_TILE, ROW_TILE, padded_shape
from modelopt_convert.formats.nvfp4.stored import read_scales


def swizzle_128x4(scale: Tensor) -> Tensor:
    """Bring row-major scales into the 128x4 order, padded with zeros; ``unswizzle_128x4`` is its inverse.

    Args:
        scale: [N, C], any dtype of one byte.

    Returns:
        ``padded_shape(N, C)``.

    Raises:
        ValueError: Not two dimensions.
    """
    if scale.ndim != 2:
        raise ValueError(f"scales must be [N, K/16], found {list(scale.shape)}")
    rows, columns = scale.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    padded = torch.zeros(padded_rows, padded_columns, dtype=torch.uint8, device=scale.device)
    padded[:rows, :columns] = scale.view(torch.uint8)
    # The four scales of a tile's row are side by side in both orders, so they move as one word.
    tiles = padded.view(torch.int32).view(padded_rows // ROW_TILE, 4, 32, padded_columns // COLUMN_TILE)
    return tiles.permute(0, 3, 2, 1).contiguous().view(torch.uint8).view(padded_rows, padded_columns).view(scale.dtype)


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
    tiles = swizzled.reshape(-1).contiguous().view(torch.int32)  # four scales a word, as above
    tiles = tiles.view(padded_rows // ROW_TILE, padded_columns // COLUMN_TILE, 32, 4)
    linear = tiles.permute(0, 3, 2, 1).contiguous().view(torch.uint8).view(padded_rows, padded_columns)
    return linear[:rows, :columns].contiguous().view(swizzled.dtype)


def scale_readings(stored: Tensor, rows: int, columns: int) -> dict[ScaleOrder, Tensor]:
    """``read_scales`` of a tensor.

    Args:
        stored: As in the file, on the CPU, any dtype of one byte.
        rows: N of the weight.
        columns: K/16 of the weight.

    Returns:
        By order, in the dtype of ``stored``.
    """
    raw = stored.contiguous().view(-1).view(torch.uint8).numpy()
    found = read_scales(raw, stored.shape, rows, columns)
    return {order: torch.from_numpy(one).view(stored.dtype) for order, one in found.items()}
