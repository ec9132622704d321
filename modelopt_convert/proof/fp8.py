"""Prove an FP8 module by sampled rows of its base.

Base rows quantized again with the export's scale must give the export's codes, by one of the three rules by which
ModelOpt is known to divide.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.fp8.codes import clipped, dequantize_fp8, quantize_fp8
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.closeness import closeness
from modelopt_convert.proof.detector import RELATED_COSINE
from modelopt_convert.proof.judgement import FormatProof, Judgement, Verdict, of_reproduced
from modelopt_convert.proof.tensors import base_rows, tensor_scale
from modelopt_convert.run.errors import InputError

_AMAX_DISAGREES = "export.amax_disagrees"


def judge_fp8(base_rows: Mapping[str, Tensor], codes: Tensor, scale: Tensor, *, max_error: float) -> Judgement:
    """Judge one module from sampled rows.

    Args:
        base_rows: The base's rows [R, K] by the name of each dtype the exporter may have quantized from.
        codes: float8_e4m3fn [R, K], the same rows of the export.
        scale: float32 [].
        max_error: Limit of the relative error where codes are not reproduced.
    """
    best, best_rule = -1, ""
    for rule, again in _again(base_rows, scale):
        equal = int((again.view(torch.uint8) == codes.view(torch.uint8)).sum())
        if equal > best:
            best, best_rule = equal, rule
        if equal == codes.numel():
            break
    rows = next(iter(base_rows.values()))
    near = closeness(rows.to(torch.float64), dequantize_fp8(codes, scale).to(torch.float64))
    verdict: Verdict = "unrelated" if abs(near.cosine) < RELATED_COSINE else "mismatch"
    if best == codes.numel():
        verdict = of_reproduced(near, best, max_error)
    elif near.within(max_error):
        verdict = "within limits"
    cut = clipped(rows, scale)
    known = best_rule if verdict == "reproduced" else None
    return Judgement(verdict, codes.numel(), best, near, rule=known, clipped=cut if cut.count else None)


def _again(base_rows: Mapping[str, Tensor], scale: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The base's rows quantized by each rule, the likeliest first."""
    for dtype, rows in base_rows.items():
        yield f"quotient in {dtype}", quantize_fp8(rows, scale)
    # The exporter takes the dtype of the first parameter; where that is F32 (Wan) it divides 16-bit weights in F32.
    for dtype, rows in base_rows.items():
        if dtype != "F32":
            yield "quotient in F32", quantize_fp8(rows.to(torch.float32), scale)
            yield f"quotient in {dtype}, scale rounded to {dtype}", quantize_fp8(rows, scale.to(rows.dtype))


class _Fp8Proof:
    method = "base rows quantized again with the export's scale; modelopt to_quantized_weight arithmetic"
    never_excused = frozenset({_AMAX_DISAGREES})  # two runs that were mixed up
    is_rebased = False

    def scale(
        self, export: CheckpointReader, base: CheckpointReader | None, module: PackedModule, calibration: Calibration
    ) -> float:
        found = dict(module.calibrated)
        for role in module.scales:
            found[role] = tensor_scale(export, module, role)
            amax = calibration.get(module.name, {}).get(role)
            if amax is not None and not amax.agrees(found[role]):
                info = module.scales[role]
                raise InputError(
                    f"{export.path / info.file}: tensor {info.name!r} is {found[role]:.9g}, the checkpoint's amax "
                    f"{amax.value:.9g} gives {amax.scale:.9g}",
                    code=_AMAX_DISAGREES,
                    path=str(export.path / info.file),
                    hint="export and checkpoint are of different runs; give the pair of one run, or no --checkpoint",
                )
        return found["weight_scale"]

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
                f"{where}: tensor {module.weight.name!r}: expected finite codes, found {broken} NaN in {len(rows)} "
                "rows",
                code="export.not_finite",
                path=where,
                hint="the export is damaged; export again",
            )
        return judge_fp8(base_rows(export, base, module, rows, common_dtype), codes, divisor, max_error=max_error)

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
        """FP8 has one layout: nothing is known to be named."""


ENTRY: FormatProof = _Fp8Proof()
