"""Recipes that widen a scale, or cut and pad columns. Pure, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import Extent, Fetch, Recipe, made, recipe_of, renamed
from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.formats.floats import Narrow

_NARROW: tuple[Narrow, ...] = get_args(Narrow)
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows that are cut behind, or get zeros behind.

    Attributes:
        of: Rows of ``width`` bytes.
        rows: How many there are.
        width: Bytes of a row of ``of``.
        wanted: Bytes of a row here.
    """

    of: Recipe
    rows: int
    width: int
    wanted: int

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self.wanted

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        done, step = 0, max(1, _PIECE_BYTES // max(self.width, self.wanted))
        both = min(self.width, self.wanted)
        while done < target.nbytes:
            first = (begin + done) // self.wanted
            last = min(first + step, -(-(begin + target.nbytes) // self.wanted))
            taken = np.empty((last - first, self.width), np.uint8)
            self.of.fill(first * self.width, taken.reshape(-1).data, fetch)
            rows = np.zeros((last - first, self.wanted), np.uint8)
            rows[:, :both] = taken[:, :both]
            skipped = begin + done - first * self.wanted
            count = min(rows.size - skipped, target.nbytes - done)
            target[done : done + count] = rows.reshape(-1)[skipped : skipped + count].data
            done += count

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        first, last = begin // self.wanted, -(-(begin + num_bytes) // self.wanted)
        return self.of.extents(first * self.width, (last - first) * self.width)


@dataclass(frozen=True, slots=True)
class Widened:
    """Floats of 8 or 16 bits as BF16 or F32: the same values.

    Attributes:
        of: The floats.
        dtype: F8_E4M3, F8_E5M2, BF16 or F16.
        wanted: BF16 (of 8 bits) or F32.
    """

    of: Recipe
    dtype: Narrow
    wanted: str

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.num_bytes * DTYPE_BITS[self.wanted] // DTYPE_BITS[self.dtype]

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        from modelopt_convert.formats.floats import bf16_of, widened_values

        done, size = 0, DTYPE_BITS[self.wanted] // 8
        while done < target.nbytes:
            first, narrow = (begin + done) // size, DTYPE_BITS[self.dtype] // 8
            last = min(first + _PIECE_BYTES // 4, -(-(begin + target.nbytes) // size))
            taken = np.empty((last - first) * narrow, np.uint8)
            self.of.fill(first * narrow, taken.data, fetch)
            values = widened_values(taken, self.dtype)
            raw: Any = (bf16_of(values) if self.wanted == "BF16" else values).view(np.uint8)
            skipped = begin + done - first * size
            count = min(raw.size - skipped, target.nbytes - done)
            target[done : done + count] = raw[skipped : skipped + count].data
            done += count

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        size, narrow = DTYPE_BITS[self.wanted] // 8, DTYPE_BITS[self.dtype] // 8
        first, last = begin // size, -(-(begin + num_bytes) // size)
        return self.of.extents(first * narrow, (last - first) * narrow)


def with_columns(info: TensorInfo, columns: int) -> TensorInfo:
    """A matrix of elements of one byte with another number of columns: cut, or padded with zeros."""
    rows, width = info.shape
    if columns == width:
        return info
    return made(info.name, info.dtype, (rows, columns), Columns(recipe_of(info), rows, width, columns), info.file)


def widened(info: TensorInfo, dtype: str) -> TensorInfo:
    """A tensor of floats of fewer bits, in BF16 or F32."""
    narrow = next((one for one in _NARROW if one == info.dtype), None)
    if info.dtype == dtype or narrow is None:
        return renamed(info, info.name)
    return made(info.name, dtype, info.shape, Widened(recipe_of(info), narrow, dtype), info.file)
