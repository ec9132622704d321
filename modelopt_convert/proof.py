"""Prove a packed weight against its BF16 base: pure judgement on sampled rows.

The idea: base rows quantized again with the export's own scales must give the export's codes. That proves nibble
order, scale order, base and producer at once. Where it does not hold (QAT, ``mtq.compress``), the dequantized rows
decide. Where those fail too, other readings of the same bytes are tried, so that the fault can be named.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modelopt_convert.transforms.nvfp4 import (
    block_scales,
    decode_e2m1,
    quantize_codes,
    swap_nibbles,
    unpack_e2m1,
)
from modelopt_convert.transforms.scales import padded_shape, unswizzle_128x4

Verdict = Literal["reproduced", "within limits", "layout", "unrelated", "mismatch", "not proven: replaced"]

GAIN_LIMIT = 0.025
ROW_LIMIT = 0.3
COLUMN_LIMIT = 0.7
# A column that lies far below the outliers of its blocks loses most of itself to any quantizer. It is not held against
# the export where the base, quantized again with the same scales, fares no better than this many times.
INHERENT_FACTOR = 1.1
# A reading is accepted as the explanation of a failure only if it is this many times better than the declared one.
RUNNER_UP_FACTOR = 3.0
RELATED_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near dequantized rows are to the base's.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the base.
        gain: <dequantized, base> / <base, base>: 1.05 if the global scale is 5% too large.
        worst_row: Largest relative error of a row.
        worst_column: Largest relative error of a column, over the sampled rows; columns that the format itself loses
            (``INHERENT_FACTOR``) are left out.
        cosine: Cosine of both as vectors.
    """

    relative_error: float
    gain: float
    worst_row: float
    worst_column: float
    cosine: float

    def within(self, max_error: float) -> bool:
        """Whether all limits hold; NaN is never within."""
        return (
            self.relative_error <= max_error
            and abs(self.gain - 1.0) <= GAIN_LIMIT
            and self.worst_row <= ROW_LIMIT
            and self.worst_column <= COLUMN_LIMIT
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one module.

    Attributes:
        verdict: ``reproduced`` and ``within limits`` pass; ``layout`` names another reading that fits; ``unrelated``
            means that no reading resembles the base.
        codes: Codes compared.
        codes_equal: Codes that came out equal.
        closeness: Of the dequantized rows; None where the codes were reproduced.
        reading: For ``layout``: the reading that fits, in words.
    """

    verdict: Verdict
    codes: int
    codes_equal: int
    closeness: Closeness | None = None
    reading: str | None = None


def sample_rows(num_rows: int, count: int) -> list[int]:
    """Row indices spread over the tensor, the first and the last always among them; the same on every run.

    One index is taken from each of ``count`` equal strips, at a position that shifts from strip to strip, so that
    different 128-row tiles and different places within a tile are met: that is what tells the scale orders apart.
    """
    if num_rows <= count + 2:
        return list(range(num_rows))
    edges = [strip * num_rows // count for strip in range(count + 1)]
    inner = [low + (37 * strip + 17) % (high - low) for strip, (low, high) in enumerate(itertools.pairwise(edges))]
    return sorted({0, *inner, num_rows - 1})


def judge(
    base_rows: Sequence[Tensor],
    packed_rows: Tensor,
    scale: Tensor,
    rows: Sequence[int],
    global_scale: Tensor,
    *,
    max_error: float,
) -> Judgement:
    """Judge one module from sampled rows.

    Args:
        base_rows: The base's rows [R, K], once for each dtype the exporter may have quantized from.
        packed_rows: uint8 [R, K/2], the same rows of the export.
        scale: float8_e4m3fn [N, K/16], all of it.
        rows: The R row indices.
        global_scale: float32 [].
        max_error: Limit of the relative error.
    """
    index = torch.tensor(rows)
    codes = unpack_e2m1(packed_rows)
    equal = max(int((quantize_codes(one, scale[index], global_scale) == codes).sum()) for one in base_rows)
    if equal == codes.numel():
        return Judgement("reproduced", codes.numel(), equal)
    base = base_rows[0].to(torch.float64)
    again = decode_e2m1(quantize_codes(base_rows[0], scale[index], global_scale))
    inherent = (again * block_scales(scale[index], global_scale) - base).norm(dim=0)
    declared = closeness(base, decode_e2m1(codes), scale[index], global_scale, inherent)
    if declared.within(max_error):
        return Judgement("within limits", codes.numel(), equal, declared)
    others = list(_other_readings(base, packed_rows, scale, index, global_scale))
    name, best = min(others, key=lambda item: item[1].relative_error)
    if best.relative_error <= max_error and best.relative_error * RUNNER_UP_FACTOR <= declared.relative_error:
        return Judgement("layout", codes.numel(), equal, declared, reading=name)
    related = max(abs(one.cosine) for one in (declared, *(other for _, other in others)))
    return Judgement("mismatch" if related >= RELATED_COSINE else "unrelated", codes.numel(), equal, declared)


def closeness(
    base: Tensor, values: Tensor, scale: Tensor, global_scale: Tensor, inherent: Tensor | None = None
) -> Closeness:
    """Compare rows with the base.

    Args:
        base: float64 [R, K].
        values: float32 [R, K], the decoded codes.
        scale: float8_e4m3fn [R, K/16].
        global_scale: float32 [].
        inherent: float64 [K], the error of each column that the format itself costs; None to count every column.
    """
    dequantized = (values * block_scales(scale, global_scale)).to(torch.float64)
    difference = dequantized - base
    norm, inner = base.norm(), (dequantized * base).sum()
    column_error = difference.norm(dim=0)
    if inherent is not None:
        column_error = column_error.masked_fill(column_error <= INHERENT_FACTOR * inherent, 0.0)
    return Closeness(
        relative_error=_ratio(difference.norm(), norm),
        gain=_ratio(inner, norm * norm, of_nothing=1.0),
        worst_row=_worst(difference.norm(dim=1), base.norm(dim=1)),
        worst_column=_worst(column_error, base.norm(dim=0)),
        cosine=_ratio(inner, norm * dequantized.norm()),
    )


def _ratio(above: Tensor, below: Tensor, of_nothing: float = 0.0) -> float:
    """``above / below``; where both are zero there is nothing to be wrong about."""
    if float(above) == 0.0 and float(below) == 0.0:
        return of_nothing
    return float(above / below)


def _worst(difference: Tensor, norm: Tensor) -> float:
    ratio = torch.where(difference == 0, torch.zeros_like(norm), difference / norm)
    return float(ratio.max())


def _other_readings(
    base: Tensor, packed_rows: Tensor, scale: Tensor, index: Tensor, global_scale: Tensor
) -> Iterator[tuple[str, Closeness]]:
    """The bytes read in every way but the declared one, each with how near it comes to the base."""
    num_rows, num_columns = scale.shape
    orders = {"linear": scale[index]}
    if padded_shape(num_rows, num_columns) == (num_rows, num_columns):
        orders["128x4"] = unswizzle_128x4(scale, num_rows, num_columns)[index]
    nibbles = {"low": packed_rows, "high": swap_nibbles(packed_rows)}
    globals_ = {"multiply": global_scale, "divide": 1.0 / global_scale}
    words = {
        "high": "the high nibble holds the even column (nibbles swapped)",
        "128x4": "the scales lie in the 128x4 order (swizzled)",
        "divide": "the global scale is a reciprocal",
    }
    for (nibble, packed), (order, scales), (convention, factor) in itertools.product(
        nibbles.items(), orders.items(), globals_.items()
    ):
        name = " and ".join(words[part] for part in (nibble, order, convention) if part in words)
        if name:
            yield name, closeness(base, decode_e2m1(unpack_e2m1(packed)), scales, factor)
