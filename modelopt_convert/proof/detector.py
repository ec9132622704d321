"""Find out how a packed weight is laid out, against its base. Pure; ``scale_hint.py`` does without a base.

Three questions, each decided on its own: which nibble holds the even column, in which order the scales lie, and whether
the global scale multiplies or divides. An answer is given only where the others are ruled out; otherwise it is
``equivalent`` (the readings decode alike, so it does not matter) or ``undetermined``.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelopt_convert.formats.layout import GlobalScale, Layout, NibbleOrder, ScaleOrder
from modelopt_convert.formats.nvfp4.codes import (
    block_scales,
    decode_e2m1,
    encode_e2m1,
    quantize_codes,
    swap_nibbles,
    unpack_e2m1,
)
from modelopt_convert.proof.closeness import Closeness, closeness

# A reading is accepted on its error alone only if it is this many times better than the best of the other readings.
RUNNER_UP_FACTOR = 3.0
# Below this cosine under every reading, export and base have nothing in common.
RELATED_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class Detection:
    """What a comparison with the base says of a module's layout.

    Attributes:
        layout: The answers.
        best: The reading that comes nearest; the canonical one where nothing tells them apart.
        codes: Codes compared.
        codes_equal: Of them equal to the base's, quantized again, under the best reading.
        closeness: Of the best reading's dequantized rows.
        related: Whether any reading resembles the base.
    """

    layout: Layout
    best: Layout
    codes: int
    codes_equal: int
    closeness: Closeness
    related: bool

    @property
    def reproduced(self) -> bool:
        """Whether the base, quantized again, gives every code."""
        return self.codes_equal == self.codes


@dataclass(frozen=True)
class _Tried:
    """A reading; what it gives, and how near it comes, is computed only if asked for."""

    reading: Layout
    bases: Sequence[Tensor]
    codes: Tensor
    scale: Tensor
    factor: Tensor
    could_be: bool

    @functools.cached_property
    def equal(self) -> int:
        return count_equal(self.bases, self.codes, self.scale, self.factor)

    @functools.cached_property
    def is_exact(self) -> bool:
        return self.could_be and self.equal == self.codes.numel()

    @functools.cached_property
    def closeness(self) -> Closeness:
        base, factors = self.bases[0].to(torch.float64), block_scales(self.scale, self.factor)
        again = decode_e2m1(quantize_codes(self.bases[0], self.scale, self.factor)) * factors
        dequantized = decode_e2m1(self.codes) * factors
        return closeness(base, dequantized.to(torch.float64), again.to(torch.float64))


def detect_with_base(
    base_rows: Sequence[Tensor],
    packed_rows: Tensor,
    readings: Mapping[ScaleOrder, Tensor],
    rows: Sequence[int],
    global_scale: Tensor,
    *,
    max_error: float,
) -> Detection:
    """Try every reading of sampled rows against the base.

    Args:
        base_rows: The base's rows [R, K], once for each dtype the exporter may have quantized from.
        packed_rows: uint8 [R, K/2], the same rows of the export.
        readings: Scales [N, K/16] by order (``scale_readings``); at least one.
        rows: The R row indices.
        global_scale: float32 [].
        max_error: Largest relative error of a reading that is accepted without reproducing the codes.
    """
    index = torch.tensor(rows)
    codes, conventions = _code_readings(packed_rows), _global_readings(global_scale)
    sampled = {order: readings[order][index] for order in _orders(readings)}
    both = list(itertools.product(sampled.items(), conventions))
    could_be = _reproducing(base_rows, [one for _, one in codes], [(scale, one) for (_, scale), (_, one) in both])
    tried = [
        _Tried(Layout(nibbles, order, convention), base_rows, one, scale, factor, could)
        for (nibbles, one), of_codes in zip(codes, could_be, strict=True)
        for ((order, scale), (convention, factor)), could in zip(both, of_codes, strict=True)
    ]
    num_codes = packed_rows.numel() * 2
    exact = [one for one in tried if one.is_exact]
    best = exact[0] if exact else min(tried, key=lambda one: one.closeness.relative_error)
    accepted = exact or ([best] if best.closeness.relative_error <= max_error else [])
    same_nibbles = torch.equal(packed_rows, swap_nibbles(packed_rows))
    same_scales = len(readings) == 2 and torch.equal(
        readings["linear"].view(torch.uint8), readings["128x4"].view(torch.uint8)
    )
    nibbles = _decide(tried, accepted, "nibbles", bool(exact), same_nibbles)
    scales = _decide(tried, accepted, "scales", bool(exact), same_scales)
    convention = _decide(tried, accepted, "global_scale", bool(exact), False)
    return Detection(
        layout=Layout(
            nibbles,  # type: ignore[arg-type]
            scales,  # type: ignore[arg-type]
            convention,  # type: ignore[arg-type]
            nibbles_by="none" if nibbles == "undetermined" else "proven",
            scales_by="none" if scales == "undetermined" else "proven",
        ),
        best=best.reading,
        codes=num_codes,
        codes_equal=best.equal,
        closeness=best.closeness,
        related=bool(exact) or any(abs(one.closeness.cosine) >= RELATED_COSINE for one in tried),
    )


def _reproducing(
    base_rows: Sequence[Tensor], codes: Sequence[Tensor], factors: Sequence[tuple[Tensor, Tensor]]
) -> list[list[bool]]:
    """Whether the base's first row, quantized again, gives the first row of codes: that refutes most readings.

    All at once: of one row, a call costs more than its arithmetic.

    Args:
        base_rows: Rows [R, K], once for each dtype.
        codes: uint8 [R, K], by nibble order.
        factors: Block scales float8_e4m3fn [R, K/16] and a global scale each.

    Returns:
        For each of ``codes`` one answer for each of ``factors``.
    """
    scale = torch.cat([one[:1] for one, _ in factors]).to(torch.float32)
    divisors = (scale * torch.stack([one for _, one in factors]).unsqueeze(1)).unsqueeze(-1)
    blocks = torch.cat([one[:1].to(torch.float32) for one in base_rows]).view(
        len(base_rows), 1, *divisors.shape[1:-1], -1
    )
    again = encode_e2m1((blocks / divisors).flatten(-2))  # by dtype and factor
    found = torch.cat([one[:1] for one in codes]).view(len(codes), 1, 1, -1)
    equal: list[list[bool]] = (again == found).all(dim=-1).any(dim=1).tolist()
    return equal


def telling_rows(readings: Mapping[ScaleOrder, Tensor], count: int) -> list[int]:
    """Rows in which the two orders of the scales differ most: what tells them apart, if anything does."""
    if len(readings) < 2:
        return []
    linear, tiled = (readings[order].view(torch.uint8).numpy() for order in ("linear", "128x4"))
    differing = np.count_nonzero(linear != tiled, axis=1)
    order = np.argsort(-differing, kind="stable")[:count]
    return sorted(int(row) for row in order if differing[row])


def _orders(readings: Mapping[ScaleOrder, Tensor]) -> list[ScaleOrder]:
    both: tuple[ScaleOrder, ...] = ("linear", "128x4")
    return [order for order in both if order in readings]


def _code_readings(packed: Tensor) -> list[tuple[NibbleOrder, Tensor]]:
    return [("low", unpack_e2m1(packed)), ("high", unpack_e2m1(swap_nibbles(packed)))]


def _global_readings(global_scale: Tensor) -> list[tuple[GlobalScale, Tensor]]:
    return [("multiply", global_scale), ("divide", 1.0 / global_scale)]


def count_equal(base_rows: Sequence[Tensor], codes: Tensor, scale: Tensor, factor: Tensor) -> int:
    """How many codes the base, quantized again, gives back: of all dtypes it may have been in, the best.

    Args:
        base_rows: Rows [R, K], once for each dtype.
        codes: uint8 [R, K].
        scale: float8_e4m3fn [R, K/16].
        factor: float32 [], the global scale.
    """
    best = 0
    for one in base_rows:
        best = max(best, int((quantize_codes(one, scale, factor) == codes).sum()))
        # All, or so few that another rounding of the base cannot be the reason.
        if best == codes.numel() or best < 0.9 * codes.numel():
            break
    return best


def worst_row(rows: Sequence[int], base: Tensor, codes: Tensor, scale: Tensor, factor: Tensor) -> str:
    """The row of those looked at that has most codes unlike the base's, in words; of several the one farthest off.

    Args:
        rows: The R row indices.
        base: [R, K].
        codes: uint8 [R, K].
        scale: float8_e4m3fn [R, K/16].
        factor: float32 [], the global scale.
    """
    wanted = base.to(torch.float64)
    difference = ((decode_e2m1(codes) * block_scales(scale, factor)).to(torch.float64) - wanted).norm(dim=1)
    errors = torch.where(difference == 0, 0.0, difference / wanted.norm(dim=1)).nan_to_num(nan=float("inf"))
    unlike = (quantize_codes(base, scale, factor) != codes).sum(dim=1)
    worst = max(range(len(rows)), key=lambda row: (int(unlike[row]), float(errors[row])))
    return (
        f"row {rows[worst]}: {int(unlike[worst])} of {codes.shape[1]} codes differ, relative error "
        f"{float(errors[worst]):.3f}, the worst of {len(rows)} rows looked at"
    )


def _decide(tried: Sequence[_Tried], accepted: Sequence[_Tried], axis: str, exact: bool, same: bool) -> str:
    """The answer to one question: the value that all accepted readings share, if every other value is ruled out."""
    if same:
        return "equivalent"
    values = {getattr(one.reading, axis) for one in accepted}
    if len(values) != 1:
        return "undetermined"
    (value,) = values
    rest = [one for one in tried if getattr(one.reading, axis) != value]
    if exact or not rest:  # no other value reproduces the codes, or the shape leaves no other
        return str(value)
    others = [one.closeness.relative_error for one in rest]
    mine = min(one.closeness.relative_error for one in accepted)
    clear = all(not math.isfinite(error) or error >= RUNNER_UP_FACTOR * mine for error in others)
    return str(value) if clear else "undetermined"
