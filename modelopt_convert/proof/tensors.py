"""What every proof reads: scales whole, weights by sampled rows, and the dtypes they may have been quantized from."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import MAX_READ_BYTES, MAX_WHOLE_BYTES, CheckpointReader
from modelopt_convert.dialects.packed import PackedModule, is_quantizer_state
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES, from_bytes
from modelopt_convert.run.errors import InputError


def load(reader: CheckpointReader, name: str, *, limit: int = MAX_WHOLE_BYTES) -> Tensor:
    """A whole tensor; for small ones.

    Raises:
        MoptError: ``input.too_large``, or what reading raises.
    """
    info = reader.tensors[name]
    return from_bytes(reader.read(name, limit=limit), info.dtype, info.shape)


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


def base_rows(
    export: CheckpointReader, base: CheckpointReader, module: PackedModule, rows: Sequence[int], common: str
) -> dict[str, Tensor]:
    """Rows of a module's weight in the base, once for each dtype that the exporter may have quantized from.

    ModelOpt divides the weight in the dtype the model was loaded in: that of the bias, or what most tensors have.

    Args:
        export: Knows the bias.
        base: Is read.
        module: Of the export.
        rows: Row indices.
        common: The dtype that most of the export has (``common_dtype``).

    Returns:
        [R, K] by safetensors dtype name, the likeliest first.

    Raises:
        InputError: ``base.not_finite``.
    """
    found = load_rows(base, module.weight.name, rows)
    info = base.tensors[module.weight.name]
    if not bool(found.to(torch.float32).isfinite().all()):
        raise InputError(
            f"{base.path / info.file}: tensor {info.name!r}: expected finite weights, found NaN or infinity",
            code="base.not_finite",
            path=str(base.path / info.file),
            hint="the base is damaged; download it again",
        )
    loaded = module.bias.dtype if module.bias is not None else common
    dtypes = dict.fromkeys((loaded, info.dtype, "BF16", "F16"))
    return {dtype: found.to(TORCH_DTYPES[dtype]) for dtype in dtypes if dtype in HALF_AND_FLOAT}


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


def unusable_scale(export: CheckpointReader, module: PackedModule, role: str, expected: str, found: str) -> InputError:
    """The error for a scale that no kernel could use."""
    info = module.scales[role]
    where = str(export.path / info.file)
    return InputError(
        f"{where}: tensor {info.name!r}: expected {expected}, found {found}",
        code="export.unusable_scale",
        path=where,
        hint=f"the module was all zero or never calibrated; export again, or --keep-bf16 '{module.name}'",
    )


def tensor_scale(export: CheckpointReader, module: PackedModule, role: str) -> float:
    """A scale of one number.

    Raises:
        InputError: ``export.unusable_scale``: not finite and positive.
    """
    value = float(load(export, module.scales[role].name))
    if not 0.0 < value < float("inf"):
        raise unusable_scale(export, module, role, "a finite positive scale", str(value))
    return value
