"""Prove an NVFP4 module by sampled rows of its base.

The idea: base rows quantized again with the export's own scales must give the export's codes. That proves nibble
order, scale order, base and producer at once. Where it does not hold (QAT, ``mtq.compress``), the dequantized rows
decide. Both are asked of every reading of the bytes, so that another layout is found and not mistaken for damage.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import CANONICAL
from modelopt_convert.formats.nvfp4.codes import block_scales, decode_e2m1, unpack_e2m1
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.scales import all_positive, scale_readings
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.closeness import closeness
from modelopt_convert.proof.detector import count_equal, detect_with_base, telling_rows
from modelopt_convert.proof.judgement import FormatProof, Judgement, Verdict, of_reproduced
from modelopt_convert.proof.tensors import base_rows, load, load_rows, tensor_scale, unusable_scale
from modelopt_convert.run.errors import InputError

# Half of the smallest positive E4M3 value, 2^-9: scales up to here round to zero (ties go to the even code).
_UNDERFLOW = 2.0**-10
# Beside the spread rows, those in which the two orders of the scales differ most.
TELLING_ROWS = 4


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


def judge(
    base_rows: Sequence[Tensor],
    packed_rows: Tensor,
    readings: Mapping[str, Tensor],
    rows: Sequence[int],
    global_scale: Tensor,
    *,
    max_error: float,
) -> Judgement:
    """Judge one module from sampled rows.

    Args:
        base_rows: The base's rows [R, K], once for each dtype the exporter may have quantized from.
        packed_rows: uint8 [R, K/2], the same rows of the export.
        readings: Scales [N, K/16] by order (``scale_readings``).
        rows: The R row indices.
        global_scale: float32 [].
        max_error: Limit of the relative error where codes are not reproduced.
    """
    verdict: Verdict
    codes = unpack_e2m1(packed_rows)
    if "linear" in readings:
        scale = readings["linear"][torch.tensor(rows)]
        if count_equal(base_rows, codes, scale, global_scale) == codes.numel():  # nearly always: look no further
            dequantized = decode_e2m1(codes) * block_scales(scale, global_scale)
            near = closeness(base_rows[0].to(torch.float64), dequantized.to(torch.float64))
            verdict = of_reproduced(near, codes.numel(), max_error)
            return Judgement(verdict, codes.numel(), codes.numel(), near, CANONICAL)
    found = detect_with_base(base_rows, packed_rows, readings, rows, global_scale, max_error=max_error)
    verdict = "mismatch" if found.related else "unrelated"
    if found.reproduced:
        verdict = of_reproduced(found.closeness, found.codes, max_error)
    elif found.closeness.within(max_error):
        verdict = "within limits" if found.best == CANONICAL or found.layout.is_clear else "undetermined"
    return Judgement(verdict, found.codes, found.codes_equal, found.closeness, found.best)


class _Nvfp4Proof:
    method = "base rows quantized again with the export's scales; modelopt NVFP4QTensor arithmetic"
    never_excused: frozenset[str] = frozenset()
    is_rebased = True

    def scale(
        self, export: CheckpointReader, base: CheckpointReader | None, module: PackedModule, calibration: Calibration
    ) -> float:
        assert base is not None  # the command requires it
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

    def judge(
        self,
        export: CheckpointReader,
        base: CheckpointReader,
        module: PackedModule,
        common_dtype: str,
        scale: float,
        max_error: float,
        rows: list[int] | None = None,
    ) -> Judgement:
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

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
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


ENTRY: FormatProof = _Nvfp4Proof()
