"""Weights and biases of nunchaku's engine, as the values that it computes with. Pure, no torch.

W4A4, which SVDQuant made: a Linear divides its input x by ``smooth`` before the 4-bit product, and not before the
low-rank one. For INT4 after GELU it adds 0.171875 to x before that division, and not before the low-rank product. So::

    y = ((x + shift) / smooth) @ (code * wscales * wtscale * wcscales)^T + x @ down^T @ up^T + bias
    W = (code * wscales * wtscale * wcscales) / smooth + up @ down
    b = bias + shift * sum over columns of (code * wscales) / smooth

``smooth_orig`` is not looked at. W4A16, which AWQ's kernel multiplies: ``W = code * wscales + wzeros``.

Sources, at nunchaku 3a3cc3d0: ``src/kernels/zgemm/gemm_w4a4.cuh`` (``quantize_w4a4_fuse_lora_kernel``,
``EpilogueQuantize``), ``gemm_w4a4_launch_impl.cuh`` (``SHIFT_GELU``, the order of the epilogues), ``gemm_base.cuh``
(``EpilogueBias``, the order of scales), ``lora.cuh`` and ``src/kernels/awq/gemv_awq.cu``; the orders of elements are in
``nunchaku_tiles.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.recipe import Extent, Fetch, Recipe
from modelopt_convert.dialects.awq import Part
from modelopt_convert.dialects.nunchaku_tiles import (
    GROUP,
    TILE,
    unpacked_awq,
    untiled_codes,
    untiled_down,
    untiled_micro,
    untiled_scales,
    untiled_up,
    untiled_vector,
)
from modelopt_convert.formats.floats import bf16_of, values_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SHIFT = 0.171875
"""What the engine adds to inputs after GELU, so that INT4 can take them unsigned."""
_STEP = 32  # rows made at a time: a product of as many rows comes out the same, wherever a read begins
_MICRO = 16  # columns that one scale of NVFP4 is for


@dataclass(frozen=True, slots=True)
class W4A4:
    """The weight of an SVDQuant module, F32 [N, K].

    The low-rank product is made in float64 and rounded to float32, as of ModelOpt's SVDQuant; the rest is float32.

    Attributes:
        rows: N, a multiple of 128.
        columns: K, a multiple of 128.
        codes: qweight.
        scales: wscales; E4M3 of NVFP4.
        smooth: ``smooth``, by which inputs are divided.
        factor: ``wtscale``, one number, or nothing.
        by_row: ``wcscales`` [N], or nothing.
        low_rank: Down [K, R] and up [N, R], or nothing.
    """

    rows: int
    columns: int
    codes: Recipe
    scales: Part
    smooth: Part
    factor: Part | None
    by_row: Part | None
    low_rank: tuple[Part, Part] | None

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is NVFP4; else INT4."""
        return self.scales.dtype == "F8_E4M3"

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self.columns * 4

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        first, last = _rows(begin, target.nbytes, self.columns)
        down = self._down(fetch)
        for start, found in self.residual(first, last, fetch):
            if down is not None and self.low_rank is not None:
                rank = down.shape[0]
                top = start // TILE * TILE
                up = untiled_up(self.low_rank[1].values(top * rank, TILE * rank, fetch), rank)
                found += (up[start - top : start - top + _STEP].astype(float) @ down).astype(found.dtype)
            _put(found, start, begin, target, self.columns)

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        first, last = _rows(begin, num_bytes, self.columns)
        top, end = first // TILE * TILE, -(-last // TILE) * TILE
        yield from _share(self.codes, top, end, self.rows)
        yield from _share(self.scales.of, top, end, self.rows)
        for part in (self.smooth, self.factor):
            if part is not None:
                yield from part.of.extents(0, part.of.num_bytes)
        if self.by_row is not None:
            yield from _share(self.by_row.of, top, end, self.rows)
        if self.low_rank is not None:
            down, up = self.low_rank
            yield from down.of.extents(0, down.of.num_bytes)
            yield from _share(up.of, top, end, self.rows)

    def residual(self, first: int, last: int, fetch: Fetch) -> "Iterator[tuple[int, Floats]]":
        """What the 4-bit product multiplies x by, in steps of 32 rows: the first row of each, and F32 [32, K]."""
        import numpy as np

        smooth = untiled_vector(self.smooth.values(0, self.columns, fetch))
        table = _pairs(is_float=self.is_nvfp4)
        factor = None if self.factor is None else self.factor.values(0, 1, fetch)[0]
        for top in range(first // TILE * TILE, last, TILE):
            codes = _bytes(self.codes, top * self.columns // 2, TILE * self.columns // 2, fetch)
            scales = self._scales(top, fetch)
            if self.by_row is not None:
                by_row = untiled_vector(self.by_row.values(top, TILE, fetch))
            for start in range(max(top, first // _STEP * _STEP), min(top + TILE, last), _STEP):
                here = slice(start - top, start - top + _STEP)
                packed = untiled_codes(codes, here)
                with np.errstate(all="ignore"):
                    blocks = np.take(table, packed).view(np.float32).reshape(_STEP, scales.shape[1], -1)
                    found = (blocks * scales[here, :, None]).reshape(_STEP, self.columns)
                    found = found if factor is None else found * factor
                    found = found if self.by_row is None else found * by_row[here, None]
                    found /= smooth
                yield start, found

    def _scales(self, top: int, fetch: Fetch) -> "Floats":
        """Of a tile, F32 [128, groups]."""
        groups = self.columns // (_MICRO if self.is_nvfp4 else GROUP)
        values = self.scales.values(top * groups, TILE * groups, fetch)
        return untiled_micro(values) if self.is_nvfp4 else untiled_scales(values)

    def _down(self, fetch: Fetch) -> "NDArray[np.float64] | None":
        """float64 [R, K]."""
        import numpy as np

        if self.low_rank is None:
            return None
        down = self.low_rank[0]
        count = down.of.num_bytes // down.size
        return untiled_down(down.values(0, count, fetch), self.columns).astype(np.float64)


@dataclass(frozen=True, slots=True)
class W4A16:
    """The weight of an AWQ module, F32 [N, K]: ``code * scale + zero``, its vectors one below the other.

    Attributes:
        rows: N.
        columns: K, a multiple of 64.
        parts: How many vectors it makes, whose rows take turns in the file.
        codes: qweight.
        scales: wscales.
        zeros: wzeros, negative and multiplied by the scale already.
    """

    rows: int
    columns: int
    parts: int
    codes: Recipe
    scales: Part
    zeros: Part

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self.columns * 4

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        groups = self.columns // GROUP
        scales, zeros = (
            one.values(0, groups * self.rows, fetch).reshape(groups, self.rows) for one in (self.scales, self.zeros)
        )
        for start, rows in self._steps(*_rows(begin, target.nbytes, self.columns)):
            low, high = int(rows[0]) // 4 * 4, -(-(int(rows[-1]) + 1) // 4) * 4
            packed = _bytes(self.codes, low * self.columns // 2, (high - low) * self.columns // 2, fetch)
            codes = unpacked_awq(packed, self.columns, rows - low).reshape(len(rows), groups, GROUP)
            with np.errstate(all="ignore"):
                found = codes * scales.T[rows, :, None] + zeros.T[rows, :, None]
            _put(found.reshape(len(rows), -1), start, begin, target, self.columns)

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        for one in (self.scales, self.zeros):
            yield from one.of.extents(0, one.of.num_bytes)
        for _, rows in self._steps(*_rows(begin, num_bytes, self.columns)):
            low, high = int(rows[0]) // 4 * 4, -(-(int(rows[-1]) + 1) // 4) * 4
            yield from _share(self.codes, low, high, self.rows)

    def _steps(self, first: int, last: int) -> "Iterator[tuple[int, NDArray[np.intp]]]":
        """Rows of one vector at a time: the first, and where they lie in the file."""
        import numpy as np

        each = self.rows // self.parts
        while first < last:
            count = min(_STEP, last - first, each - first % each)
            yield first, np.arange(first % each, first % each + count) * self.parts + first // each
            first += count


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Weights F32 whose columns stand beside each other; see ``checkpoint/recipe.py`` for ones below each other."""

    rows: int
    parts: tuple[W4A4, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return sum(part.num_bytes for part in self.parts)

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        columns = self.num_bytes // self.rows // 4
        first, last = _rows(begin, target.nbytes, columns)
        wide = [one.columns * 4 for one in self.parts]
        found = [
            _bytes(one, first * width, (last - first) * width, fetch).reshape(-1, width)
            for one, width in zip(self.parts, wide, strict=True)
        ]
        _put(np.hstack(found).view(np.float32), first, begin, target, columns)

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        first, last = _rows(begin, num_bytes, self.num_bytes // self.rows // 4)
        for one in self.parts:
            yield from one.extents(first * one.columns * 4, (last - first) * one.columns * 4)


@dataclass(frozen=True, slots=True)
class Bias:
    """The bias [N] of one or several W4A4 modules whose outputs are added, rounded to its dtype once.

    Attributes:
        parts: ``bias`` of each, and the weight whose inputs are shifted, or nothing.
        rows: N.
    """

    parts: tuple[tuple[Part, W4A4 | None], ...]
    rows: int

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self.parts[0][0].size

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        found = np.zeros(self.rows, np.float64)
        for part, shifted in self.parts:
            found += untiled_vector(part.values(0, self.rows, fetch))
            if shifted is not None:
                for start, weight in shifted.residual(0, self.rows, fetch):
                    found[start : start + len(weight)] += SHIFT * weight.sum(1, dtype=np.float64)
        target[:] = _rounded(found, self.parts[0][0].dtype)[begin : begin + target.nbytes].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        for part, shifted in self.parts:
            yield from part.of.extents(0, part.of.num_bytes)
            if shifted is not None:
                yield from shifted.extents(0, shifted.num_bytes)


@dataclass(frozen=True, slots=True)
class BiasInTurns:
    """The bias [N] of an AWQ module, its vectors one behind the other, without the 1 that was added to the scales.

    Attributes:
        of: ``bias``.
        rows: N.
        parts: How many vectors there are; the second and the last but one are scales.
    """

    of: Part
    rows: int
    parts: int

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.of.num_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        found = self.of.values(0, self.rows, fetch).reshape(-1, self.parts).T.astype(float)
        for which in {1, self.parts - 2}:
            found[which] -= 1
        target[:] = _rounded(found.reshape(-1), self.of.dtype)[begin : begin + target.nbytes].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        return self.of.of.extents(0, self.of.of.num_bytes)


@cache
def _pairs(*, is_float: bool) -> "NDArray[np.uint64]":
    """Two float32 values by the byte of their codes, the low one first, uint64 [256]: E2M1, or a signed integer."""
    import numpy as np

    codes = np.arange(16)
    values = values_of("F4") if is_float else ((codes ^ 8) - 8).astype(np.float32)
    both = np.stack((np.tile(values, 16), np.repeat(values, 16)), axis=-1)
    return np.ascontiguousarray(both, np.float32).view(np.uint64).reshape(-1)


def _rounded(values: "NDArray[np.float64]", dtype: str) -> "NDArray[np.uint8]":
    """Bytes of values in BF16, F16 or F32."""
    import numpy as np

    with np.errstate(all="ignore"):
        single = values.astype(np.float32)
        found = bf16_of(single) if dtype == "BF16" else single.astype(np.float16 if dtype == "F16" else np.float32)
    return np.ascontiguousarray(found).view(np.uint8)


def _rows(begin: int, num_bytes: int, columns: int) -> tuple[int, int]:
    """The rows of F32 under some bytes."""
    return begin // (columns * 4), -(-(begin + num_bytes) // (columns * 4))


def _put(found: "Floats", row: int, begin: int, target: memoryview, columns: int) -> None:
    """Lay rows F32 from one on into what is asked for of them."""
    import numpy as np

    raw = np.ascontiguousarray(found, np.float32).reshape(-1).view(np.uint8)
    start = row * columns * 4
    skipped, done = max(0, begin - start), max(0, start - begin)
    count = min(raw.size - skipped, target.nbytes - done)
    if count > 0:
        target[done : done + count] = raw[skipped : skipped + count].data


def _share(recipe: Recipe, first: int, last: int, rows: int) -> Iterator[Extent]:
    """What some of the rows take, where all take alike."""
    width = recipe.num_bytes // rows
    return recipe.extents(first * width, (last - first) * width)


def _bytes(recipe: Recipe, begin: int, count: int, fetch: Fetch) -> "NDArray[np.uint8]":
    import numpy as np

    found = np.empty(count, np.uint8)
    recipe.fill(begin, found.data, fetch)
    return found
