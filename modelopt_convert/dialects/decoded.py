"""Packed modules decoded to BF16 or F32, in pieces. Pure, no torch.

A value is ``code * (block scale * global scale)`` in float32, for BF16 rounded once: the order in which comfy-kitchen
0.2.40, torchao 0.18.0 and ModelOpt 0.47.0 multiply. As there are few codes and few block scales, all products are in a
table.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import Extent, Fetch, Recipe, made, recipe_of
from modelopt_convert.dialects.form import E8M0_BLOCK, Algorithm, Quantized
from modelopt_convert.formats.floats import bf16_of, values_of
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Plain = Literal["BF16", "F32"]
_PIECE = 1 << 14  # values decoded at a time
_SIZES: Mapping[Plain, int] = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Decoded:
    """The values [N, K] of a packed weight.

    Attributes:
        algorithm: How it is packed.
        rows: N.
        columns: K.
        codes: The weight, as a description has it.
        scales: ``weight_scale`` where there is one for each block or row.
        scale: The F32 scale of the whole weight: ``weight_scale_2`` of nvfp4, ``weight_scale`` of fp8.
        dtype: Of the values.
    """

    algorithm: Algorithm
    rows: int
    columns: int
    codes: Recipe
    scales: Recipe | None
    scale: Recipe | None
    dtype: Plain = "BF16"

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self._row_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        first, last = self._rows(begin, target.nbytes)
        factor = _bytes(self.scale, 0, 4, fetch).tobytes() if self.scale is not None else None
        step = max(1, _PIECE // self.columns)
        # Scales that lie in tiles come by whole tiles.
        for top in range(first - first % ROW_TILE, last, ROW_TILE):
            here, end = max(first, top), min(last, top + ROW_TILE)
            width = self._scale_bytes
            scales = _bytes(self.scales, here * width, (end - here) * width, fetch) if self.scales is not None else None
            for row in range(here, end, step):
                stop = min(row + step, end)
                values = self._values(
                    row, stop, None if scales is None else scales[(row - here) * width :], factor, fetch
                )
                raw = values.reshape(-1).view(np.uint8)
                start = row * self._row_bytes
                skipped, done = max(0, begin - start), max(0, start - begin)
                count = min(raw.size - skipped, target.nbytes - done)
                if count > 0:
                    target[done : done + count] = raw[skipped : skipped + count].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        first, last = self._rows(begin, num_bytes)
        for recipe, width in ((self.scales, self._scale_bytes), (self.codes, self._code_bytes)):
            if recipe is not None:
                yield from recipe.extents(first * width, (last - first) * width)
        if self.scale is not None:
            yield from self.scale.extents(0, 4)

    def _rows(self, begin: int, num_bytes: int) -> tuple[int, int]:
        width = self._row_bytes
        return begin // width, -(-(begin + num_bytes) // width)

    @property
    def _row_bytes(self) -> int:
        return self.columns * _SIZES[self.dtype]

    @property
    def _code_bytes(self) -> int:
        return self.columns // 2 if self.algorithm == "nvfp4" else self.columns

    @property
    def _scale_bytes(self) -> int:
        return self.scales.num_bytes // self.rows if self.scales is not None else 0

    def _values(
        self, first: int, last: int, scales: "NDArray[np.uint8] | None", factor: bytes | None, fetch: Fetch
    ) -> "NDArray[Any]":
        """The bits of the values of some rows."""
        import numpy as np

        count = last - first
        codes = _bytes(self.codes, first * self._code_bytes, count * self._code_bytes, fetch).reshape(count, -1)
        if self.algorithm == "nvfp4":
            assert scales is not None and factor is not None
            of_blocks = scales[: count * self._scale_bytes].reshape(-1, 1).astype(np.intp) << 8
            return np.take(_pairs(factor, self.dtype), of_blocks | codes.reshape(-1, BLOCK_SIZE // 2))
        if self.algorithm == "mxfp8":
            assert scales is not None
            of_rows = scales[: count * self._scale_bytes].reshape(count, -1).astype(np.intp) << 8
            return np.take(_blocks(self.dtype), np.repeat(of_rows, E8M0_BLOCK, axis=1)[:, : self.columns] | codes)
        table = values_of("F8_E5M2" if self.algorithm == "fp8_e5m2" else "F8_E4M3")
        if scales is None:
            return _bits(table if factor is None else _scaled(table, factor), self.dtype)[codes]
        by_row = scales[: count * 4].copy().view(np.float32)
        with np.errstate(all="ignore"):
            return _bits(table[codes] * by_row[:, None], self.dtype)


def decoded(quantized: Quantized, roles: Mapping[str, TensorInfo], dtype: Plain = "BF16") -> TensorInfo:
    """A module's weight as values.

    Args:
        quantized: The module.
        roles: Its tensors, as a description has them.
        dtype: Of the values.
    """
    weight, scale = roles["weight"], roles.get("weight_scale")
    by_row = scale is not None and bool(scale.shape)
    one = roles.get("weight_scale_2") if quantized.algorithm == "nvfp4" else None if by_row else scale
    recipe = Decoded(
        quantized.algorithm,
        quantized.rows,
        quantized.columns,
        recipe_of(weight),
        recipe_of(scale) if scale is not None and by_row else None,
        recipe_of(one) if one is not None else None,
        dtype,
    )
    return made(weight.name, dtype, (quantized.rows, quantized.columns), recipe, weight.file)


def _bytes(recipe: Recipe, begin: int, count: int, fetch: Fetch) -> "NDArray[np.uint8]":
    import numpy as np

    found = np.empty(count, np.uint8)
    recipe.fill(begin, found.data, fetch)
    return found


def _scaled(table: "NDArray[np.float32]", factor: bytes) -> "NDArray[np.float32]":
    import numpy as np

    with np.errstate(all="ignore"):
        return table * np.float32(struct.unpack("<f", factor)[0])


def _bits(values: "NDArray[np.float32]", dtype: Plain) -> "NDArray[Any]":
    import numpy as np

    return bf16_of(values) if dtype == "BF16" else np.ascontiguousarray(values).view(np.uint32)


@lru_cache(maxsize=8)
def _pairs(factor: bytes, dtype: Plain) -> "NDArray[Any]":
    """Two values by ``block scale << 8 | byte of two codes``, the low code's first: a word of both for each [65536]."""
    import numpy as np

    with np.errstate(all="ignore"):
        values = _bits(values_of("F4") * _scaled(values_of("F8_E4M3"), factor)[:, None], dtype)
    codes = np.arange(256)
    pairs = np.stack((values[:, codes & 15], values[:, codes >> 4]), axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32 if dtype == "BF16" else np.uint64).reshape(-1)


@lru_cache(maxsize=2)
def _blocks(dtype: Plain) -> "NDArray[Any]":
    """The bits of a value by ``E8M0 scale << 8 | E4M3 code`` [65536]."""
    import numpy as np

    with np.errstate(all="ignore"):
        return _bits(values_of("F8_E4M3") * values_of("F8_E8M0")[:, None], dtype).reshape(-1)
