"""Read what the proof of an FP8 module needs from export and base, and judge it."""

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.modelopt.export import PackedModule
from modelopt_convert.dialects.modelopt.fp8 import Calibration
from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.judgement import Judgement
from modelopt_convert.proof.judgement_fp8 import judge_fp8
from modelopt_convert.proof.tensors import base_rows, tensor_scale
from modelopt_convert.run.errors import InputError

METHOD = "base rows quantized again with the export's scale; modelopt to_quantized_weight arithmetic"
AMAX_DISAGREES = "export.amax_disagrees"


def usable_fp8_scale(export: CheckpointReader, module: PackedModule, calibration: Calibration) -> float:
    """The weight's scale, after both scales were looked at and compared with a ``--checkpoint``'s amax.

    Raises:
        InputError: ``export.unusable_scale`` or ``export.amax_disagrees``.
    """
    found = dict(module.calibrated)
    for role in module.scales:
        found[role] = tensor_scale(export, module, role)
        amax = calibration.get(module.name, {}).get(role)
        if amax is not None and not amax.agrees(found[role]):
            info = module.scales[role]
            raise InputError(
                f"{export.path / info.file}: tensor {info.name!r} is {found[role]:.9g}, the checkpoint's amax "
                f"{amax.value:.9g} gives {amax.scale:.9g}",
                code=AMAX_DISAGREES,
                path=str(export.path / info.file),
                hint="export and checkpoint are of different runs; give the pair of one run, or no --checkpoint",
            )
    return found["weight_scale"]


def judge_fp8_module(
    export: CheckpointReader,
    base: CheckpointReader,
    module: PackedModule,
    common_dtype: str,
    scale: float,
    max_error: float,
    rows: list[int] | None = None,
) -> Judgement:
    """Judge one module by the rows given, or by sampled ones; of one still to be quantized, what it will become.

    Raises:
        InputError: ``base.not_finite``.
    """
    rows = rows or sample_rows(module.rows, SAMPLED_ROWS)
    width = module.weight.num_bytes // module.rows
    raw = export.read_rows(module.weight.name, rows, width)
    divisor = torch.tensor(scale, dtype=torch.float32)
    codes = from_bytes(raw, module.weight.dtype, (len(rows), module.columns))
    if module.weight.dtype != "F8_E4M3":
        codes = quantize_fp8(codes, divisor)
    broken = int(codes.to(torch.float32).isnan().count_nonzero())
    if broken:
        where = str(export.path / module.weight.file)
        raise InputError(
            f"{where}: tensor {module.weight.name!r}: expected finite codes, found {broken} NaN in {len(rows)} rows",
            code="export.not_finite",
            path=where,
            hint="the export is damaged; export again",
        )
    return judge_fp8(base_rows(export, base, module, rows, common_dtype), codes, divisor, max_error=max_error)
