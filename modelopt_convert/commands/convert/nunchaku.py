"""What becomes of nunchaku's modules, which BF16 alone can hold, and how near they are to a base.

No torch. A module of nunchaku is described as the values that its engine multiplies by (``dialects/nunchaku.py``).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.commands.convert.awq import near_base
from modelopt_convert.commands.convert.inexact import Lossy, Settled, of_base
from modelopt_convert.dialects.form import Canonical, ReadBytes
from modelopt_convert.dialects.nunchaku_form import FORM, Undone
from modelopt_convert.dialects.nunchaku_tiles import untiled_vector
from modelopt_convert.dialects.source import Source
from modelopt_convert.dialects.values import cast
from modelopt_convert.formats.floats import bf16_of
from modelopt_convert.run.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

_WHY = "decoded, smoothing undone, and rounded to BF16 once"


def is_nunchaku(source: Source) -> bool:
    """Whether a checkpoint is of nunchaku's engine."""
    return source.form is FORM


def refuse_other_targets(source: Source, target: str, where: str) -> None:
    """Refuse to write nunchaku's modules in anything but BF16.

    Raises:
        InputError: ``convert.no_place``.
    """
    if is_nunchaku(source) and target != "bf16":
        raise InputError(
            f"{where}: {target} has no place for the smoothing and the low-rank parts of nunchaku's modules: they go "
            "to bf16 alone",
            code="convert.no_place",
            path=where,
            hint="--to bf16 multiplies them out; quantize OUT again for another engine",
        )


def settle_decoded(described: Canonical, read: ReadBytes, *, measure: bool) -> Settled:
    """Bring every module of nunchaku to BF16.

    Args:
        described: Of the source, under diffusers' names.
        read: Reads the source.
        measure: Whether weights may be read, to tell the error of each module.
    """
    tensors = dict(described.tensors)
    lossy: list[Lossy] = []
    for name in described.modules:
        info = tensors[f"{name}.weight"]
        tensors[info.name] = cast(info, "BF16")
        lossy.append(Lossy(name, (name,), "bf16", _WHY, _rounding(info, read) if measure else None))
    return Settled(replace(described, tensors=tensors, modules={}), tuple(lossy), {})


def prove_near_nunchaku(reader: CheckpointReader, described: Canonical, base: CheckpointReader, limit: float) -> str:
    """Compare every module's weight with the base's; in words, how near they are.

    The distance is that of what was quantized: the base's weight, its columns multiplied by ``smooth``. Where smoothing
    became a part of the module before, it is compared with the base's weight that has it likewise.

    Args:
        reader: The source.
        described: Its description, under diffusers' names.
        base: The base; its files are beside the source's.
        limit: The largest relative error (Frobenius) of a module.

    Raises:
        CheckFailedError: ``check.proof``.
        InputError: ``base.no_counterpart``.
    """
    modules = {name: one for name, one in described.modules.items() if isinstance(one, Undone)}
    wanted = {name: of_base(base, name, (one.rows, one.columns)) for name, one in modules.items()}
    errors = {
        name: _apart(described.tensors[f"{name}.weight"], cast(wanted[name], "F32"), one, reader)
        for name, one in modules.items()
    }
    return near_base(errors, limit, str(reader.path), "nunchaku's SVDQuant and AWQ")


def _rounding(info: TensorInfo, read: ReadBytes) -> float:
    """Relative Frobenius error of rounding F32 [N, K] to BF16."""
    import numpy as np

    error = size = 0.0
    for begin in range(0, info.num_bytes, CHUNK_BYTES):
        values = np.frombuffer(read(info, begin, min(CHUNK_BYTES, info.num_bytes - begin)), np.float32)
        rounded = (bf16_of(values).astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):
            apart = values.astype(np.float64) - rounded
        error, size = error + float(apart @ apart), size + float(np.square(values, dtype=np.float64).sum())
    return math.sqrt(error / size) if size else 0.0


def _apart(found: TensorInfo, wanted: TensorInfo, one: Undone, reader: CheckpointReader) -> float:
    """Relative Frobenius error of F32 [N, K], in the weights that were quantized."""
    import numpy as np

    smooth = _joined(one.smooth, reader)
    moved = _joined(one.original, reader) / smooth
    before = np.ones(one.rows) if one.after is None else np.divide(*(_whole(part, reader) for part in one.after))
    error = size = 0.0
    for begin, count in _pieces(found, one.columns):
        rows = slice(begin // (one.columns * 4), (begin + count) // (one.columns * 4))
        left, right = (
            np.frombuffer(reader.read_of(info, begin, count), np.float32).reshape(-1, one.columns).astype(np.float64)
            for info in (found, wanted)
        )
        right *= before[rows, None] * moved
        with np.errstate(all="ignore"):
            apart, scaled = ((left - right) * smooth).reshape(-1), (right * smooth).reshape(-1)
        error, size = error + float(apart @ apart), size + float(scaled @ scaled)
    return math.sqrt(error / size) if size else (math.inf if error else 0.0)


def _pieces(info: TensorInfo, columns: int) -> Iterator[tuple[int, int]]:
    """Where whole rows of F32 begin, and how many bytes they are."""
    step = max(1, CHUNK_BYTES // (columns * 4)) * columns * 4
    for begin in range(0, info.num_bytes, step):
        yield begin, min(step, info.num_bytes - begin)


def _joined(parts: Iterable[TensorInfo], reader: CheckpointReader) -> "Doubles":
    """Vectors one behind the other; 1 where there are none."""
    import numpy as np

    found = [_whole(part, reader) for part in parts]
    return np.concatenate(found) if found else np.ones(1)


def _whole(info: TensorInfo, reader: CheckpointReader) -> "Doubles":
    """A vector that lies in the engine's order, float64."""
    import numpy as np

    wide = cast(info, "F32")
    return untiled_vector(np.frombuffer(reader.read_of(wide, 0, wide.num_bytes), np.float32)).astype(np.float64)
