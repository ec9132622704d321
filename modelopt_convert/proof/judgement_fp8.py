"""Judge an E4M3 weight by sampled rows of its base. Pure.

Base rows quantized again with the export's scale must give the export's codes, by one of the three rules by which
ModelOpt is known to divide.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from modelopt_convert.formats.fp8.codes import clipped, dequantize_fp8, quantize_fp8
from modelopt_convert.proof.closeness import closeness
from modelopt_convert.proof.detector import RELATED_COSINE
from modelopt_convert.proof.judgement import Judgement, Verdict, of_reproduced


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
