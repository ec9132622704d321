"""Judge an NVFP4 weight by sampled rows of its BF16 base. Pure.

The idea: base rows quantized again with the export's own scales must give the export's codes. That proves nibble
order, scale order, base and producer at once. Where it does not hold (QAT, ``mtq.compress``), the dequantized rows
decide. Both are asked of every reading of the bytes, so that another layout is found and not mistaken for damage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modelopt_convert.formats.fp8.codes import Clipped
from modelopt_convert.formats.nvfp4.codes import block_scales, decode_e2m1, unpack_e2m1
from modelopt_convert.proof.closeness import Closeness, closeness
from modelopt_convert.proof.detector import Reading, count_equal, detect_with_base

Verdict = Literal["reproduced", "within limits", "undetermined", "unrelated", "mismatch"]


# Below so many codes the error of a right module scatters.
_ENOUGH_CODES = 1024


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one module.

    Attributes:
        verdict: ``reproduced`` and ``within limits`` pass; ``undetermined``: several readings come near; ``unrelated``:
            none resembles the base; ``mismatch``: one resembles it, but not enough.
        codes: Codes compared.
        codes_equal: Of them equal to the base's, quantized again.
        closeness: Of the dequantized rows.
        reading: NVFP4: the reading that fits best.
        rule: FP8: how the exporter divided, if the codes are reproduced.
        clipped: FP8: base values in these rows that the scale is too small for, if any.
    """

    verdict: Verdict
    codes: int
    codes_equal: int
    closeness: Closeness
    reading: Reading | None = None
    rule: str | None = None
    clipped: Clipped | None = None

    @property
    def passed(self) -> bool:
        """Whether the module is what the base says it should be."""
        return self.verdict in ("reproduced", "within limits")


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
    index, canonical = torch.tensor(rows), Reading("low", "linear", "multiply")
    codes = unpack_e2m1(packed_rows)
    if "linear" in readings:
        scale = readings["linear"][index]
        if count_equal(base_rows, codes, scale, global_scale) == codes.numel():  # nearly always: look no further
            dequantized = decode_e2m1(codes) * block_scales(scale, global_scale)
            near = closeness(base_rows[0].to(torch.float64), dequantized.to(torch.float64))
            verdict = of_reproduced(near, codes.numel(), max_error)
            return Judgement(verdict, codes.numel(), codes.numel(), near, canonical)
    found = detect_with_base(base_rows, packed_rows, readings, rows, global_scale, max_error=max_error)
    verdict = "mismatch" if found.related else "unrelated"
    if found.reproduced:
        verdict = of_reproduced(found.closeness, found.codes, max_error)
    elif found.closeness.within(max_error):
        answers = (found.nibbles, found.scales, found.global_scale)
        clear = found.best == canonical or "undetermined" not in answers
        verdict = "within limits" if clear else "undetermined"
    return Judgement(verdict, found.codes, found.codes_equal, found.closeness, found.best)


def of_reproduced(near: Closeness, num_codes: int, max_error: float) -> Verdict:
    """A stale global scale clips the weight, and the clipped codes are reproduced all the same: the error tells."""
    limit = max_error if num_codes >= _ENOUGH_CODES else 2 * max_error
    return "reproduced" if near.relative_error <= limit else "mismatch"
