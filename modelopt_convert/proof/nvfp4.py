"""Read what the proof of an NVFP4 module needs from export and base, and judge it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.modelopt.export import PackedModule
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.scales import all_positive, scale_readings
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.detector import telling_rows
from modelopt_convert.proof.judgement import Judgement, judge
from modelopt_convert.proof.tensors import base_rows, load, load_rows, tensor_scale, unusable_scale
from modelopt_convert.run.errors import InputError

METHOD = "base rows quantized again with the export's scales; modelopt NVFP4QTensor arithmetic"
# Half of the smallest positive E4M3 value, 2^-9: scales up to here round to zero (ties go to the even code).
_UNDERFLOW = 2.0**-10
# Beside the spread rows, those in which the two orders of the scales differ most.
TELLING_ROWS = 4


def usable_nvfp4_scale(export: CheckpointReader, base: CheckpointReader, module: PackedModule) -> float:
    """The global scale, after all scales of the module were looked at.

    A float: many small tensors held between large ones keep the allocator from giving memory back.

    Raises:
        InputError: ``export.unusable_scale`` or ``export.padding``.
    """
    global_scale = tensor_scale(export, module, "weight_scale_2")
    tensor_scale(export, module, "input_scale")
    raw = load(export, module.scales["weight_scale"].name).view(torch.uint8)
    if all_positive(raw):
        return global_scale
    broken = int(((raw & 0x7F) == 0x7F).count_nonzero())
    if broken:
        raise unusable_scale(export, module, "weight_scale", "finite scales", f"{broken} NaN of {raw.numel()}")
    negative = int((raw > 0x80).count_nonzero())
    if negative:
        found = f"{negative} negative of {raw.numel()}"
        raise unusable_scale(export, module, "weight_scale", "positive scales", found)
    if bool(((raw & 0x7F) == 0).any()):
        # In padding zeros are right; where they are is known for each reading. One reading must explain them all.
        counts = [
            _unexplained_zeros(base, module, (reading.view(torch.uint8) & 0x7F) == 0, global_scale)
            for reading in _scale_readings(export, module).values()
        ]
        if min(counts):
            found = f"{min(counts)} zero that no underflow explains"
            raise unusable_scale(export, module, "weight_scale", "non-zero scales", found)
    return global_scale


def _unexplained_zeros(base: CheckpointReader, module: PackedModule, zero: Tensor, global_scale: float) -> int:
    """Zero block scales over base blocks that are too large to have underflowed (ModelOpt up to 0.44 had no clamp)."""
    count = 0
    divisor = 6.0 * torch.tensor(global_scale, dtype=torch.float32)
    for row in zero.any(dim=1).nonzero().flatten().tolist():
        block_amax = (
            load_rows(base, module.weight.name, [row])[0].to(torch.float32).abs().view(-1, BLOCK_SIZE).amax(dim=1)
        )
        count += int((zero[row] & (block_amax / divisor > _UNDERFLOW)).sum())
    return count


def judge_nvfp4(
    export: CheckpointReader,
    base: CheckpointReader,
    module: PackedModule,
    common_dtype: str,
    scale: float,
    max_error: float,
    rows: list[int] | None = None,
) -> Judgement:
    """Judge one module by the rows given, or by sampled ones and those in which the orders of its scales differ most.

    Raises:
        InputError: ``export.padding`` or ``base.not_finite``.
    """
    readings = _scale_readings(export, module)
    if rows is None:
        rows = sorted({*sample_rows(module.rows, SAMPLED_ROWS), *telling_rows(readings, TELLING_ROWS)})
    half, stored = module.columns // 2, module.weight.shape[1]
    packed = export.read_rows(module.weight.name, rows, stored, half)
    return judge(
        list(base_rows(export, base, module, rows, common_dtype).values()),
        from_bytes(packed, "U8", (len(rows), half)),
        readings,
        rows,
        torch.tensor(scale, dtype=torch.float32),
        max_error=max_error,
    )


def _scale_readings(export: CheckpointReader, module: PackedModule) -> dict[str, Tensor]:
    info = module.scales["weight_scale"]
    readings = scale_readings(load(export, info.name), module.rows, module.columns // BLOCK_SIZE)
    if not readings:
        raise InputError(
            f"{export.path / info.file}: tensor {info.name!r}: expected zeros in the padding, found scales",
            code="export.padding",
            path=str(export.path / info.file),
            hint="the scales are not those of this weight; export again",
        )
    return readings


def name_the_layout(export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
    """Turn a failure that is a matter of layout into an error that says so.

    Raises:
        InputError: ``export.layout``.
    """
    readings = {name: one.reading for name, one in modules.items() if one.reading is not None}
    reciprocal = [
        name for name, reading in readings.items() if modules[name].passed and reading.global_scale == "divide"
    ]
    if reciprocal:
        raise InputError(
            f"{export.path}: {len(reciprocal)} of {len(modules)} modules have a reciprocal weight_scale_2 "
            f"({reciprocal[0]} first)",
            code="export.layout",
            path=str(export.path),
            hint="that is compressed-tensors' convention under ModelOpt's names; export again with ModelOpt",
        )
    unclear = [name for name in readings if modules[name].verdict == "undetermined"]
    if unclear:
        raise InputError(
            f"{export.path}: {len(unclear)} of {len(modules)} modules fit the base in several layouts "
            f"({unclear[0]} first), the nearest being: {readings[unclear[0]].in_words()}",
            code="export.layout",
            path=str(export.path),
            hint="what cannot be proven is not converted; export again without post-processing",
        )
