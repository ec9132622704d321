"""NVFP4 codes and block scales as they lie in files, by numpy: what only moves bytes does without torch."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.shapes import COLUMN_TILE, ROW_TILE, padded_shape, scale_shapes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE_WORDS = 1 << 15  # a quarter of a million bytes, which a core's cache holds beside the same again
_OWN = threading.local()  # what each thread works in
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F  # of eight bytes
_NAN = 0x7F  # the bits of NaN in E4M3; larger bytes are negative


def swap_nibbles_in(codes: "NDArray[np.uint8]") -> None:
    """Exchange the two codes of every byte, in place.

    Args:
        codes: uint8 [M], contiguous.
    """
    import numpy as np

    low, nibble = np.uint64(_LOW_NIBBLES), np.uint64(4)
    whole = codes.size // 8 * 8
    words = codes[:whole].view(np.uint64)
    # In place: fresh memory would cost more than the work. In large pieces: numpy gives up Python's lock for each.
    if not hasattr(_OWN, "room"):
        _OWN.room = np.empty(_PIECE_WORDS, np.uint64)
    for first in range(0, words.size, _PIECE_WORDS):
        piece = words[first : first + _PIECE_WORDS]
        high = _OWN.room[: piece.size]
        np.right_shift(piece, nibble, out=high)
        high &= low
        piece &= low
        piece <<= nibble
        piece |= high
    rest = codes[whole:]
    rest[:] = rest >> 4 | rest << 4


def repack_rows(raw: bytes | memoryview, stored_half: int, half: int, num_rows: int, *, swap: bool) -> memoryview:
    """Bring rows of packed codes into the canonical layout: padding cut, the even column in the low nibble.

    Args:
        raw: Whole stored rows; a buffer that may be written to is used as room for the result.
        stored_half: Bytes of a stored row.
        half: Bytes of a row without padding, K/2.
        num_rows: Rows to keep; what follows is padding.
        swap: Whether the high nibble holds the even column.

    Raises:
        ValueError: The padding is not zero.
    """
    import numpy as np

    rows = np.frombuffer(raw, np.uint8).reshape(-1, stored_half)
    if rows[num_rows:].any() or rows[:, half:].any():
        raise ValueError("the padding to be cut is not zero")
    kept = np.ascontiguousarray(rows[:num_rows, :half]).reshape(-1)
    if swap:
        kept = kept if kept.flags.writeable else kept.copy()
        swap_nibbles_in(kept)
    return kept.data


def tiled(grid: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """Row-major scales in the 128x4 order.

    Args:
        grid: uint8 [N, C], padded: N a multiple of 128, C of 4.

    Returns:
        uint8 [N * C].
    """
    import numpy as np

    rows, columns = grid.shape
    # The four scales of a tile's row are side by side in both orders, so they move as one word.
    words = grid.view(np.int32).reshape(rows // ROW_TILE, 4, 32, columns // COLUMN_TILE)
    return np.ascontiguousarray(words.transpose(0, 3, 2, 1)).view(np.uint8).reshape(-1)


def untiled(stored: "NDArray[np.uint8]", columns: int) -> "NDArray[np.uint8]":
    """The inverse of ``tiled``.

    Args:
        stored: uint8 [N * C].
        columns: C.

    Returns:
        uint8 [N, C].
    """
    import numpy as np

    words = stored.view(np.int32).reshape(-1, columns // COLUMN_TILE, 32, 4)
    return np.ascontiguousarray(words.transpose(0, 3, 2, 1)).view(np.uint8).reshape(-1, columns)


def swizzle_scales(raw: bytes, stored: Sequence[int]) -> memoryview:
    """Bring row-major block scales [N, K/16] into the 128x4 order, padded.

    Raises:
        ValueError: Not two dimensions.
    """
    import numpy as np

    if len(stored) != 2:
        raise ValueError(f"scales must be [N, K/16], found {list(stored)}")
    rows, columns = stored
    grid = np.zeros(padded_shape(rows, columns), np.uint8)
    grid[:rows, :columns] = np.frombuffer(raw, np.uint8).reshape(rows, columns)
    return tiled(grid).data


def read_scales(
    raw: "bytes | NDArray[np.uint8]", stored: Sequence[int], rows: int, columns: int
) -> "dict[ScaleOrder, NDArray[np.uint8]]":
    """The orders in which scales can be stored, as far as shape and zeros in the padding allow.

    Args:
        raw: All bytes of the tensor.
        stored: Its shape.
        rows: N of the weight.
        columns: K/16 of the weight.

    Returns:
        The scales read as ``linear`` and as ``128x4``, as far as possible, each [N, K/16] row-major; empty if the
        shape is not a known one, or if no reading has zeros for padding.
    """
    import numpy as np

    found: dict[ScaleOrder, NDArray[np.uint8]] = {}
    for shape in scale_shapes(rows, columns):
        order: ScaleOrder = "128x4" if shape.swizzled else "linear"
        if tuple(stored) != shape.stored or order in found:
            continue
        flat = np.frombuffer(raw, np.uint8)
        whole = untiled(flat, shape.grid[1]) if shape.swizzled else flat.reshape(shape.grid)
        if not whole[rows:].any() and not whole[:, columns:].any():
            found[order] = np.ascontiguousarray(whole[:rows, :columns])
    return found


def reorder_scales(raw: bytes, stored: Sequence[int], rows: int, columns: int, order: ScaleOrder) -> memoryview:
    """Bring block scales into row-major [rows, columns] from ``order``.

    Args:
        raw: All bytes of the tensor.
        stored: Its shape.
        rows: N.
        columns: K/16.
        order: The stored order, ``linear`` or ``128x4``.

    Raises:
        ValueError: The stored shape allows no such reading.
    """
    readings = read_scales(raw, stored, rows, columns)
    if order not in readings:
        raise ValueError(f"scales {list(stored)} cannot be [{rows}, {columns}] in the {order} order")
    return readings[order].reshape(-1).data


def all_positive(stored: "NDArray[np.uint8]") -> bool:
    """Whether every scale is a positive number, none NaN or zero: the least and the largest byte tell.

    Args:
        stored: E4M3 bytes of any shape.
    """
    return not stored.size or (int(stored.min()) > 0 and int(stored.max()) < _NAN)
