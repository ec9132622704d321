"""Recipes that change values: scales brought to another factor, values cast, a base quantized. No torch.

torch is imported when bytes are first wanted. Every recipe works on whole blocks of a weight, whose blocks of codes and
scales lie in the same order where both are row-major; so any range of bytes takes what lies under it, and no more.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import Extent, Fetch, Recipe, made, recipe_of
from modelopt_convert.dialects.form import ReadBytes
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

_PIECE = 1 << 15  # bytes of codes, or of values of a base: what is made of them stays in a core's cache
_SIZES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Mapped:
    """Bytes replaced by a table.

    Attributes:
        of: The bytes.
        table: What each of the 256 becomes.
    """

    of: Recipe
    table: bytes

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.num_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        self.of.fill(begin, target, fetch)
        codes, table = np.frombuffer(target, np.uint8), np.frombuffer(self.table, np.uint8)
        for first in range(0, codes.size, _PIECE):
            piece = codes[first : first + _PIECE]
            piece[:] = table[piece]

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        return self.of.extents(begin, num_bytes)


@dataclass(frozen=True, slots=True)
class Cast:
    """Values of one dtype in another, rounded to nearest even."""

    of: Recipe
    dtype: str
    to: str

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.num_bytes // _SIZES[self.dtype] * _SIZES[self.to]

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        from modelopt_convert.formats.tensor_bytes import cast_chunk

        size, width = _SIZES[self.dtype], _SIZES[self.to]
        first, last = begin // width, -(-(begin + target.nbytes) // width)
        values = bytearray((last - first) * size)
        self.of.fill(first * size, memoryview(values), fetch)
        skipped = begin - first * width
        target[:] = cast_chunk(memoryview(values), self.dtype, self.to)[skipped : skipped + target.nbytes]

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        size, width = _SIZES[self.dtype], _SIZES[self.to]
        first, last = begin // width, -(-(begin + num_bytes) // width)
        return self.of.extents(first * size, (last - first) * size)


@dataclass(frozen=True, slots=True)
class Requantized:
    """Codes or block scales that max calibration gives to a weight under a known scale.

    Attributes:
        of: The weight [N, K], K a multiple of 16.
        dtype: Of the weight.
        part: What of it: codes of NVFP4, block scales of NVFP4, or codes of FP8.
        factor: The global scale of NVFP4, the one scale of FP8: a float32.
    """

    of: Recipe
    dtype: str
    part: Literal["codes", "scales", "fp8"]
    factor: float

    @property
    def _values(self) -> tuple[int, int]:
        """How many values make how many bytes."""
        return {"codes": (BLOCK_SIZE, BLOCK_SIZE // 2), "scales": (BLOCK_SIZE, 1), "fp8": (1, 1)}[self.part]

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        values, width = self._values
        return self.of.num_bytes // _SIZES[self.dtype] // values * width

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        from modelopt_convert.formats.arithmetic import quantized_blocks, quantized_values

        values, width = self._values
        size = values * _SIZES[self.dtype]
        first, last = begin // width, -(-(begin + target.nbytes) // width)
        step = max(1, 8 * _PIECE // size)
        for start in range(first, last, step):
            end = min(start + step, last)
            raw = memoryview(bytearray((end - start) * size))
            self.of.fill(start * size, raw, fetch)
            if self.part == "fp8":
                quantized = quantized_values(raw, self.dtype, self.factor)
            else:
                quantized = quantized_blocks(raw, self.dtype, self.factor)[self.part == "scales"]
            skipped = max(0, begin - start * width)
            kept = quantized[skipped : begin + target.nbytes - start * width]
            place = start * width + skipped - begin
            target[place : place + kept.nbytes] = kept

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        values, width = self._values
        size = values * _SIZES[self.dtype]
        first, last = begin // width, -(-(begin + num_bytes) // width)
        return self.of.extents(first * size, (last - first) * size)


def cast(info: TensorInfo, to: str) -> TensorInfo:
    """A tensor of floats in another dtype; the same one if it has that dtype."""
    if info.dtype == to:
        return info
    return made(info.name, to, info.shape, Cast(recipe_of(info), info.dtype, to), info.file)


def float_of(info: TensorInfo, read: ReadBytes) -> float:
    """The value of a scale F32 []."""
    return float(struct.unpack("<f", read(info, 0, 4))[0])
