"""How the bytes of a tensor come from bytes of files, where a tensor is not simply a stretch of one. No torch.

A recipe reads any range of its bytes, and takes no more of the files than the range needs, up to a row of tiles. So a
checkpoint in another dialect or naming is read as the one that it stands for, in pieces, without a copy on disk.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.formats.dtypes import num_bytes as num_bytes_of
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE, padded_shape, round_up
from modelopt_convert.formats.nvfp4.stored import swap_nibbles_in, tiled, untiled

Fetch = Callable[[str, int, memoryview], None]
"""Fills a buffer with bytes of a file: the file's name, and the first byte."""


class Recipe(Protocol):
    """The bytes of a tensor."""

    @property
    def num_bytes(self) -> int:
        """How many there are."""

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on; it may be written to more than once."""

    def extents(self, begin: int, num_bytes: int) -> "Iterator[Extent]":
        """What ``fill`` takes of files."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes as they lie in a file."""

    file: str
    start: int
    num_bytes: int

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        fetch(self.file, self.start + begin, target)

    def extents(self, begin: int, num_bytes: int) -> "Iterator[Extent]":
        """What ``fill`` takes of files."""
        yield Extent(self.file, self.start + begin, num_bytes)


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes that are known."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        """How many there are."""
        return len(self.data)

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        target[:] = self.data[begin : begin + target.nbytes]

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """Nothing is taken of files."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Zeros:
    """Padding."""

    num_bytes: int

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with zeros."""
        target[:] = bytes(target.nbytes)

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """Nothing is taken of files."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Cut:
    """A stretch of other bytes."""

    of: Recipe
    start: int
    num_bytes: int

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        self.of.fill(self.start + begin, target, fetch)

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        return self.of.extents(self.start + begin, num_bytes)


@dataclass(frozen=True, slots=True)
class Joined:
    """Several stretches, one behind the other."""

    parts: tuple[Recipe, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return sum(part.num_bytes for part in self.parts)

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        done = 0
        for part, first, count in self._within(begin, target.nbytes):
            part.fill(first, target[done : done + count], fetch)
            done += count

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        for part, first, count in self._within(begin, num_bytes):
            yield from part.extents(first, count)

    def _within(self, begin: int, num_bytes: int) -> Iterator[tuple[Recipe, int, int]]:
        ends = accumulate(part.num_bytes for part in self.parts)
        for part, end in zip(self.parts, ends, strict=True):
            first, last = max(begin, end - part.num_bytes), min(begin + num_bytes, end)
            if first < last:
                yield part, first - (end - part.num_bytes), last - first


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Bytes of another checkpoint, whose files the reader knows under a name in front; see ``reader.take_beside``."""

    of: Recipe
    place: str

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.num_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        self.of.fill(begin, target, lambda file, start, part: fetch(f"{self.place}/{file}", start, part))

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        for one in self.of.extents(begin, num_bytes):
            yield Extent(f"{self.place}/{one.file}", one.start, one.num_bytes)


@dataclass(frozen=True, slots=True)
class NibblesSwapped:
    """Packed codes with the two of each byte exchanged."""

    of: Recipe

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.of.num_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        self.of.fill(begin, target, fetch)
        swap_nibbles_in(np.frombuffer(target, np.uint8))

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        return self.of.extents(begin, num_bytes)


@dataclass(frozen=True, slots=True)
class RowMajor:
    """Block scales that lie in the 128x4 order, row by row and without padding; see ``formats/nvfp4/scales.py``.

    Attributes:
        of: The stored bytes, of ``padded_shape(rows, columns)`` scales.
        rows: N.
        columns: Scales of a row.
    """

    of: Recipe
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self.columns

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        num_bytes = target.nbytes
        first, last = self._tiles(begin, num_bytes)
        width = padded_shape(self.rows, self.columns)[1]
        stored = np.empty((last - first) * ROW_TILE * width, np.uint8)
        self.of.fill(first * ROW_TILE * width, stored.data, fetch)
        rows = np.ascontiguousarray(untiled(stored, width)[:, : self.columns]).reshape(-1)
        skipped = begin - first * ROW_TILE * self.columns
        target[:] = rows[skipped : skipped + num_bytes].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        first, last = self._tiles(begin, num_bytes)
        width = padded_shape(self.rows, self.columns)[1]
        return self.of.extents(first * ROW_TILE * width, (last - first) * ROW_TILE * width)

    def _tiles(self, begin: int, num_bytes: int) -> tuple[int, int]:
        return begin // (ROW_TILE * self.columns), -(-(begin + num_bytes) // (ROW_TILE * self.columns))


@dataclass(frozen=True, slots=True)
class Tiled:
    """Row-major block scales brought into the 128x4 order, padded with zeros.

    Attributes:
        of: Scales [rows, columns], row-major.
        rows: N.
        columns: Scales of a row.
    """

    of: Recipe
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """How many bytes there are, padding included."""
        return math.prod(padded_shape(self.rows, self.columns))

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        num_bytes = target.nbytes
        if not num_bytes:
            return
        width = padded_shape(self.rows, self.columns)[1]
        first, last = self._tiles(begin, num_bytes)
        start, count = self._taken(first, last)
        grid = np.zeros(((last - first) * ROW_TILE, width), np.uint8)
        taken = np.empty(count, np.uint8)
        self.of.fill(start, taken.data, fetch)
        grid[: count // self.columns, : self.columns] = taken.reshape(count // self.columns, self.columns)
        skipped = begin - first * ROW_TILE * width
        target[:] = tiled(grid)[skipped : skipped + num_bytes].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        return self.of.extents(*self._taken(*self._tiles(begin, num_bytes)))

    def _tiles(self, begin: int, num_bytes: int) -> tuple[int, int]:
        row = ROW_TILE * padded_shape(self.rows, self.columns)[1]
        return begin // row, -(-(begin + num_bytes) // row)

    def _taken(self, first: int, last: int) -> tuple[int, int]:
        start = first * ROW_TILE * self.columns
        return start, min(last * ROW_TILE, self.rows) * self.columns - start


def recipe_of(info: TensorInfo) -> Recipe:
    """Where a tensor's bytes come from."""
    return info.recipe if info.recipe is not None else Extent(info.file, info.start, info.num_bytes)


def made(name: str, dtype: str, shape: Sequence[int], recipe: Recipe, file: str) -> TensorInfo:
    """A tensor whose bytes come by a recipe.

    Args:
        name: The tensor's name.
        dtype: safetensors dtype name.
        shape: Shape; with the dtype it must take the recipe's bytes.
        recipe: The bytes.
        file: The file that messages name.
    """
    count = num_bytes_of(dtype, shape)
    assert count == recipe.num_bytes, (name, dtype, shape, recipe.num_bytes)
    if isinstance(recipe, Extent):
        return TensorInfo(name, dtype, tuple(shape), recipe.file, recipe.start, count)
    return TensorInfo(name, dtype, tuple(shape), file, 0, count, recipe)


def renamed(info: TensorInfo, name: str) -> TensorInfo:
    """The same bytes under another name."""
    return replace(info, name=name)


def rows_of(info: TensorInfo, name: str, first: int, rows: int) -> TensorInfo:
    """Some rows of a tensor [N, ...], as a tensor of their own."""
    row_bytes = info.num_bytes // info.shape[0]
    source = recipe_of(info)
    part: Recipe = (
        Extent(source.file, source.start + first * row_bytes, rows * row_bytes)
        if isinstance(source, Extent)
        else Cut(source, first * row_bytes, rows * row_bytes)
    )
    return made(name, info.dtype, (rows, *info.shape[1:]), part, info.file)


def joined_rows(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """Tensors that differ in their rows alone, one below the other."""
    if len(parts) == 1:
        return renamed(parts[0], name)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return made(name, parts[0].dtype, shape, Joined(tuple(map(recipe_of, parts))), parts[0].file)


def halves_swapped(info: TensorInfo, name: str) -> TensorInfo:
    """A tensor whose upper and lower half of rows have changed places."""
    half = info.shape[0] // 2
    return joined_rows(name, [rows_of(info, name, half, info.shape[0] - half), rows_of(info, name, 0, half)])


def padded_rows(info: TensorInfo, name: str, multiple: int) -> TensorInfo:
    """A tensor with rows of zeros below, up to a multiple."""
    rows = round_up(info.shape[0], multiple)
    if rows == info.shape[0]:
        return renamed(info, name)
    zeros = Zeros((rows - info.shape[0]) * (info.num_bytes // info.shape[0]))
    return made(name, info.dtype, (rows, *info.shape[1:]), Joined((recipe_of(info), zeros)), info.file)
