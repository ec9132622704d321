"""Tensors that are not quantized: the base's, up to a cast between float dtypes."""

from dataclasses import replace
from threading import Event
from typing import Literal

import torch

from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.formats.tensor_bytes import cast_paths, equal_after, equal_bytes, from_bytes
from modelopt_convert.proof.closeness import Nearness
from modelopt_convert.run.workers import until

_COMPARED_BYTES = 1 << 21  # of either side: the calls for smaller pieces keep other workers from Python's lock
_COMPARED_VALUES = 1 << 18


def rounded_side(
    export: CheckpointReader, base: CheckpointReader, name: str, stopped: Event
) -> Literal["export", "base"] | None:
    """Which side a cast between float dtypes makes of the other, if a tensor is the base's up to a cast.

    Returns:
        ``export``, also where nothing was rounded; ``base`` if its values alone are rounded; None if the tensor is not
        the base's.

    Raises:
        Stopped: The event was set meanwhile.
    """
    source, target = base.tensors[name].dtype, export.tensors[name].dtype
    if source == target:
        pairs = zip(export.buffered(name, _COMPARED_BYTES), base.buffered(name, _COMPARED_BYTES), strict=True)
        if all(equal_bytes(left, right) for left, right in until(stopped, pairs)):
            return "export"
    if not {source, target} <= HALF_AND_FLOAT:
        return None
    down, up = cast_paths(source, target), cast_paths(target, source)
    source_bytes, target_bytes = DTYPE_BITS[source] // 8, DTYPE_BITS[target] // 8
    num_elements = CHUNK_BYTES // 4
    left_chunks = base.chunks(name, num_elements * source_bytes)
    casts = zip(left_chunks, export.chunks(name, num_elements * target_bytes), strict=True)
    for left, right in until(stopped, casts):
        values, wanted = from_bytes(left, source, (-1,)), from_bytes(right, target, (-1,))
        down = [path for path in down if equal_after(values, path, wanted)]
        up = [path for path in up if equal_after(wanted, path, values)]
        if not (down or up):
            return None
    return "export" if down else "base"


def first_difference(export: CheckpointReader, base: CheckpointReader, name: str) -> str:
    """Where the first element lies that is not the base's, cast, and both values, in words; shapes are equal."""
    source, target = base.tensors[name].dtype, export.tensors[name].dtype
    if not {source, target} <= HALF_AND_FLOAT:
        return f"{target}, the base's is {source}" if source != target else ""
    sides = [
        (side, dtype, CHUNK_BYTES // 4 * DTYPE_BITS[dtype] // 8) for side, dtype in ((base, source), (export, target))
    ]
    top = 0
    for pieces in zip(*(side.chunks(name, size) for side, _, size in sides), strict=True):
        values, found = (from_bytes(piece, dtype, (-1,)) for piece, (_, dtype, _) in zip(pieces, sides, strict=True))
        wanted = values.to(found.dtype)
        bits = torch.int32 if target == "F32" else torch.int16
        differs = (wanted.view(bits) != found.view(bits)).nonzero().view(-1)
        if len(differs):
            at = int(differs[0])
            place = [int(one) for one in torch.unravel_index(torch.tensor(top + at), export.tensors[name].shape)]
            return f"first at {place}: expected {float(wanted[at]):.9g}, found {float(found[at]):.9g}"
        top += len(found)
    return ""


def is_near_base(export: CheckpointReader, base: CheckpointReader, name: str, max_error: float) -> bool:
    """Whether a tensor lies within the limits for dequantized codes; shapes are equal.

    The values of a vector are not limited one by one: many are next to zero.
    """
    mine, theirs = export.tensors[name], base.tensors[name]
    if not {mine.dtype, theirs.dtype} <= HALF_AND_FLOAT or not mine.shape:
        return False
    columns = mine.shape[-1]
    sums = Nearness(columns)
    height = max(1, _COMPARED_VALUES // columns)
    sides = [
        (side, info.dtype, columns * DTYPE_BITS[info.dtype] // 8) for side, info in ((export, mine), (base, theirs))
    ]
    for pieces in zip(*(side.buffered(name, height * width) for side, _, width in sides), strict=True):
        found, wanted = (
            from_bytes(piece, dtype, (-1, columns)).to(torch.float64)
            for piece, (_, dtype, _) in zip(pieces, sides, strict=True)
        )
        sums.add(wanted, found)
    near = sums.closeness()
    return (near if len(mine.shape) > 1 else replace(near, worst_row=0.0, worst_column=0.0)).within(max_error)
