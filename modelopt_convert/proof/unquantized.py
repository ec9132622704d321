"""Tensors that are not quantized: the base's, up to a cast between float dtypes."""

from threading import Event

from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.formats.tensor_bytes import cast_paths, equal_after, equal_bytes, from_bytes
from modelopt_convert.run.workers import until

_COMPARED_BYTES = 1 << 20  # of either side, while it is in a core's cache


def same_up_to_cast(export: CheckpointReader, base: CheckpointReader, name: str, stopped: Event) -> bool:
    """Whether a tensor is the base's, directly or rounded to another float dtype.

    Raises:
        Stopped: The event was set meanwhile.
    """
    source, target = base.tensors[name].dtype, export.tensors[name].dtype
    if source == target:
        pairs = zip(export.buffered(name, _COMPARED_BYTES), base.buffered(name, _COMPARED_BYTES), strict=True)
        if all(equal_bytes(left, right) for left, right in until(stopped, pairs)):
            return True
    if not {source, target} <= HALF_AND_FLOAT:
        return False
    paths = cast_paths(source, target)
    source_bytes, target_bytes = DTYPE_BITS[source] // 8, DTYPE_BITS[target] // 8
    num_elements = CHUNK_BYTES // 4
    left_chunks = base.chunks(name, num_elements * source_bytes)
    casts = zip(left_chunks, export.chunks(name, num_elements * target_bytes), strict=True)
    for left, right in until(stopped, casts):
        values, wanted = from_bytes(left, source, (-1,)), from_bytes(right, target, (-1,))
        paths = [path for path in paths if equal_after(values, path, wanted)]
        if not paths:
            return False
    return True
