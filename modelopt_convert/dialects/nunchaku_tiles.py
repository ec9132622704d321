"""The orders in which nunchaku's engine reads elements, undone. Pure, no torch.

Each order is that of a warp: 32 lanes hold the registers of a matrix product of 16 rows, or of 8.

==================  ========================  ===================================================================
tensor              shape as stored           order, from the slowest index to the fastest
==================  ========================  ===================================================================
qweight of W4A4     I8 [N, K/2]               N/128, K/64, 8 x 16 rows, lane of 8 rows and of 4 x 8 columns, then
                                              the two eights of rows, the two 32 of columns, 8 columns, low first
wscales of INT4     [K/64, N]                 N/128, K/64, 8 x 16 rows, 4 pairs, the two eights, the two of a pair
vectors             [N] or [K]                as wscales of INT4 with one group
wscales of NVFP4    F8_E4M3 [K/16, N]         N/128, K/64, 8 rows, 4 x 8 rows, 4 x 32 rows, then 4 columns
down, up            [K, R], [N, R]            K or N by 16, R by 16, lane of 8 and of 4 pairs, then two and two
qweight of W4A16    I32 [N/4, K/2]            N/4, K/64, 4 rows, 2 x 32 columns, 8, then every eighth, low first
wscales, wzeros     [K/64, N]                 row-major
==================  ========================  ===================================================================

Sources, at nunchaku 3a3cc3d0: ``nunchaku/lora/flux/packer.py``, ``src/kernels/zgemm/gemm_base.cuh`` and ``lora.cuh``,
``src/kernels/awq/gemv_awq.cu``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TILE = 128
"""Rows of a tile of W4A4; columns are padded to it as well."""
RANK = 16
"""The rank is a multiple of it."""
GROUP = 64
"""Columns that one scale of INT4 is for, in W4A4 and W4A16."""


def untiled_codes(raw: "NDArray[np.uint8]", rows: slice) -> "NDArray[np.uint8]":
    """Rows of a tile of W4A4's qweight, uint8 [rows, K/2], the low nibble first.

    Args:
        raw: The tile's bytes [64 * K].
        rows: Which of its 128 rows, by multiples of 16.
    """
    import numpy as np

    words = raw.view(np.uint32).reshape(-1, 8, 8, 4, 2, 2)[:, rows.start // 16 : rows.stop // 16]
    return np.ascontiguousarray(words.transpose(1, 4, 2, 0, 5, 3)).view(np.uint8).reshape(rows.stop - rows.start, -1)


def untiled_scales(tile: "NDArray[Any]") -> "NDArray[Any]":
    """Scales of INT4 of a tile [groups * 128], as [128, groups]."""
    return tile.reshape(-1, 8, 4, 2, 2).transpose(1, 3, 2, 4, 0).reshape(TILE, -1)


def untiled_micro(tile: "NDArray[Any]") -> "NDArray[Any]":
    """Scales of NVFP4 of a tile [K/64 * 128 * 4], as [128, K/16]."""
    return tile.reshape(-1, 8, 4, 4, 4).transpose(3, 2, 1, 0, 4).reshape(TILE, -1)


def untiled_vector(vector: "NDArray[Any]") -> "NDArray[Any]":
    """A vector [N] in the order of its elements."""
    return vector.reshape(-1, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1)


def untiled_up(values: "NDArray[Any]", rank: int) -> "NDArray[Any]":
    """Up [N * R], as [N, R]."""
    return values.reshape(-1, rank // RANK, 8, 4, 2, 2, 2).transpose(0, 4, 2, 1, 5, 3, 6).reshape(-1, rank)


def untiled_down(values: "NDArray[Any]", columns: int) -> "NDArray[Any]":
    """Down [K * R], as [R, K]."""
    tiles = values.reshape(columns // 16, -1, 8, 4, 2, 2, 2)
    return tiles.transpose(1, 4, 2, 0, 5, 3, 6).reshape(-1, columns)


def unpacked_awq(raw: "NDArray[np.uint8]", columns: int, rows: "NDArray[np.intp]") -> "NDArray[np.float32]":
    """Codes of rows of W4A16's qweight, 0 to 15 as float32 [rows, K].

    Args:
        raw: Bytes of whole fours of rows.
        columns: K.
        rows: Which of these.
    """
    import numpy as np

    words = raw.view(np.uint16).reshape(-1, columns // GROUP, 4, 2, 8).transpose(0, 2, 1, 3, 4)
    chosen = words.reshape(-1, columns // GROUP, 2, 1, 8)[rows]
    codes = chosen >> np.arange(0, 16, 4, dtype=np.uint16)[:, None] & 15
    return codes.reshape(len(rows), columns).astype(np.float32)
