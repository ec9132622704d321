"""What every proof reads: scales whole, weights by sampled rows, and the dtypes they may have been quantized from."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import MAX_READ_BYTES, MAX_WHOLE_BYTES, CheckpointReader
from modelopt_convert.dialects.packed import PackedModule, is_quantizer_state
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.formats.nvfp4.codes import max_magnitude
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES, from_bytes
from modelopt_convert.run.errors import InputError

_F16_MAX = 65504.0
_TILE_VALUES = 1 << 18  # half a megabyte of BF16: arithmetic makes several wider copies
MANY_VALUES = 1 << 20  # where none is made: enough to outweigh the calls


def load(reader: CheckpointReader, name: str, *, limit: int = MAX_WHOLE_BYTES) -> Tensor:
    """A whole tensor; for small ones.

    Raises:
        MoptError: ``input.too_large``, or what reading raises.
    """
    info = reader.tensors[name]
    return from_bytes(reader.read_writable(name, limit=limit), info.dtype, info.shape)


def load_weight(reader: CheckpointReader, name: str) -> Tensor:
    """A whole weight, as one that is multiplied is needed.

    Raises:
        MoptError: As ``load``.
    """
    return load(reader, name, limit=MAX_READ_BYTES)


def load_rows(reader: CheckpointReader, name: str, rows: Sequence[int]) -> Tensor:
    """Some rows [R, K] of a weight [N, K]."""
    info = reader.tensors[name]
    columns = info.shape[1]
    row_bytes = columns * DTYPE_BITS[info.dtype] // 8
    return from_bytes(reader.read_rows(name, rows, row_bytes), info.dtype, (len(rows), columns))


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of a module, in export and base.

    Attributes:
        rows: Their indices int64 [R]; or, if they are consecutive, as a slice.
        base: [R, K] in the dtype that was quantized.
        stored: Of the export's weight, as it is stored, padding cut: [R, K/2] or [R, K].
    """

    rows: slice | Tensor
    base: Tensor
    stored: Tensor

    def row_numbers(self) -> Tensor:
        """Their indices, int64 [R]."""
        return torch.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else self.rows

    def parts(self, per_row: int) -> Tensor | int:
        """The numbers of their parts in the weight, int64 [R * per_row]; or the first, if rows are consecutive."""
        if isinstance(self.rows, slice):
            return int(self.rows.start) * per_row
        return (torch.arange(per_row) + self.rows.unsqueeze(1) * per_row).view(-1)


@dataclass(frozen=True, slots=True)
class Again:
    """Rows of the base, quantized again; good until the next.

    Attributes:
        base: [R, K] in the dtype that was quantized.
        packed: uint8 [R, K/2], low nibble first.
        scale: Bytes of the block scales, uint8 [R, K/16].
        amax: Largest magnitude of ``base``; NaN and infinity are larger than all.
    """

    base: Tensor
    packed: Tensor
    scale: Tensor
    amax: float


class Quantizer(Protocol):
    """Where the base is quantized again instead of on the CPU, for the same bytes."""

    def height(self, row_bytes: int) -> int:
        """Rows of so many bytes that are worked on at a time; 0 if a row is too long."""

    def again(self, base: CheckpointReader, info: TensorInfo, cast: str, scale: float, height: int) -> Iterator[Again]:
        """A weight, so many rows at a time.

        Args:
            base: Holds the weight.
            info: Its place.
            cast: The dtype that it is brought to first.
            scale: The global scale.
            height: Rows at a time.

        Raises:
            BackendError: The device failed.
        """


def tiles(
    export: CheckpointReader,
    base: CheckpointReader,
    module: PackedModule,
    cast: str,
    stored: str,
    rows: Sequence[int] | None,
    num_values: int = _TILE_VALUES,
) -> Iterator[Tile]:
    """A module's weight in export and base, in tiles that stay in a core's cache; each good until the next.

    Args:
        export: Holds the codes.
        base: Holds the weight.
        module: Of the export.
        cast: The dtype that the base's rows are brought to.
        stored: The dtype of the codes.
        rows: The rows to be read; None for all.
        num_values: How many a tile has at most, if a row has not more.
    """
    info = base.tensors[module.weight.name]
    height = max(1, num_values // module.columns)
    row_bytes = module.columns * DTYPE_BITS[info.dtype] // 8
    if rows is None:
        pieces = zip(
            base.buffered(info.name, height * row_bytes),
            stored_rows(export, module, stored, height),
            strict=False,  # the export may be padded by further rows
        )
        for top, (theirs, mine) in zip(range(0, module.rows, height), pieces, strict=False):
            values = cast_to(from_bytes(theirs, info.dtype, (-1, module.columns)), cast)
            yield Tile(slice(top, top + len(values)), values, mine[: len(values)])
        return
    stored_bytes, kept = _stored_row(module, stored)
    for start in range(0, len(rows), height):
        part = rows[start : start + height]
        values = cast_to(load_rows(base, info.name, part), cast)
        raw = export.read_rows(module.weight.name, part, stored_bytes)
        codes = from_bytes(raw, stored, (len(part), -1))[:, :kept]
        yield Tile(torch.tensor(part), values, codes)


def cast_to(values: Tensor, dtype: str) -> Tensor:
    """Values in another dtype of floats; what is too large for F16 becomes its largest, and not infinite.

    A base has such values where no export was made from it in F16. That is for the comparison to find.
    """
    target = TORCH_DTYPES[dtype]
    if values.dtype == target:
        return values
    if dtype == "F16":
        values = values.clamp(-_F16_MAX, _F16_MAX)
    return values.to(target)


def stored_rows(export: CheckpointReader, module: PackedModule, stored: str, height: int) -> Iterator[Tensor]:
    """A module's weight as it is stored, so many rows at a time, columns of padding cut; each good until the next."""
    stored_bytes, kept = _stored_row(module, stored)
    for piece in export.buffered(module.weight.name, height * stored_bytes):
        yield from_bytes(piece, stored, (len(piece) // stored_bytes, -1))[:, :kept]


def _stored_row(module: PackedModule, stored: str) -> tuple[int, int]:
    """Bytes from one stored row to the next, and elements of a row without padding."""
    kept = module.columns // 2 if stored == "U8" else module.columns
    return module.weight.num_bytes // module.weight.shape[0], kept


def finite_amax(base: CheckpointReader, module: PackedModule, rows: Tensor) -> float:
    """Largest magnitude of some of the base's rows.

    Raises:
        InputError: ``base.not_finite``.
    """
    return finite(base, module, max_magnitude(rows))


def finite(base: CheckpointReader, module: PackedModule, amax: float) -> float:
    """The largest magnitude of some of the base's rows, once it is known to be a number.

    Raises:
        InputError: ``base.not_finite``.
    """
    if not amax < float("inf"):
        info = base.tensors[module.weight.name]
        raise InputError(
            f"{base.folder / info.file}: tensor {info.name!r}: expected finite weights, found NaN or infinity",
            code="base.not_finite",
            path=str(base.folder / info.file),
            hint="the base is damaged; download it again",
        )
    return amax


def casts_of(export_common: str, base: CheckpointReader, module: PackedModule) -> tuple[str, ...]:
    """The dtypes that the exporter may have quantized a module from, the likeliest first.

    ModelOpt divides the weight in the dtype the model was loaded in: that of the bias, or what most tensors have.

    Args:
        export_common: The dtype that most of the export has (``common_dtype``).
        base: Has the weight.
        module: Of the export.
    """
    loaded = module.bias.dtype if module.bias is not None else export_common
    stored = base.tensors[module.weight.name].dtype
    return tuple(dtype for dtype in dict.fromkeys((loaded, stored, "BF16", "F16")) if dtype in HALF_AND_FLOAT)


def common_dtype(export: CheckpointReader) -> str:
    """The dtype in which the exporter held most of the model: that of most unquantized tensors."""
    counts = Counter(
        info.dtype
        for name, info in export.tensors.items()
        if name.rpartition(".")[2] in ("weight", "bias")
        and info.dtype in HALF_AND_FLOAT
        and not is_quantizer_state(name)
    )
    return max(counts, key=lambda dtype: (counts[dtype], dtype), default="BF16")
