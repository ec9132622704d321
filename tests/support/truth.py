"""The strongest verdict that is true of packed bytes, by plain arithmetic over the whole weight: what a judge must say.

Float64 and whole tensors throughout. Nothing here is shared with the package.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from producers import (
    E4M3,
    VERDICTS,
    Packed,
    PackedFp8,
    block_errors,
    codes_under,
    dequantized,
    each,
    fp8_scale,
    fp8_under,
    is_nearest,
    max_calibration,
    max_calibration_0_44,
    max_scales,
    unpack,
)
from support import same_bits
from torch import Tensor

TIE = 2.0**-22  # 2 ulp of float32
ROUNDING = 1e-6  # of squared errors


class Reading(NamedTuple):
    """How stored bytes are read: which nibble is the even column's, and how the scales lie."""

    nibbles: str
    scales: str


def equal(left: Packed, right: Packed) -> bool:
    return all(map(same_bits, left, right))


def midpoint_distance(base: Tensor, one: Packed) -> Tensor:
    """How far, relatively, a value lies from the nearest midpoint of two codes; float64 [N, K]."""
    quotient = (base.double() / each(one.scale.double() * one.global_scale.double())).abs()
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    return ((quotient[..., None] - middles).abs() / middles).amin(-1)


def strongest(base: Tensor, one: Packed) -> str:
    """The strongest verdict that holds of a weight read in the right way; "near" for none."""
    if any(equal(one, rule(base)) for rule in (max_calibration, max_calibration_0_44)):
        return "reproduced"
    is_calibrated = same_bits(one.global_scale, max_calibration(base).global_scale)
    if is_calibrated and bool(same_scales(base, one).all()) and bool(same_codes(base, one).all()):
        return "reproduced but for ties"
    clipped = float(one.global_scale) * 6 * 448 < float(base.float().abs().max()) * (1 - TIE)
    return "nearest" if not clipped and not bool(worse_blocks(base, one).any()) else "near"


def same_codes(base: Tensor, one: Packed) -> Tensor:
    """Codes that the base has under the scales that are there, but for ties and signs of zero: bool [N, K]."""
    codes, expected = unpack(one.packed), unpack(codes_under(base, one.scale, one.global_scale).packed)
    neighbours = (midpoint_distance(base, one) <= TIE) & is_nearest(base, one)
    return (codes == expected) | ((codes % 8 == 0) & (expected % 8 == 0)) | neighbours


def same_scales(base: Tensor, one: Packed) -> Tensor:
    """Scales that max calibration gives under this global scale, or that are the neighbour at a midpoint."""
    common = max_calibration(base, one.global_scale)
    left, right = common.scale.view(torch.uint8).int(), one.scale.view(torch.uint8).int()
    middle = (common.scale.double() + one.scale.double()) / 2
    tied = ((left - right).abs() <= 1) & ((max_scales(base, one.global_scale) / middle - 1).abs() <= TIE)
    return (left == right) | tied


def worse_blocks(base: Tensor, one: Packed) -> Tensor:
    """Blocks that no search by plain error makes under this global scale: bool [N, K/16]."""
    common, old = (rule(base, one.global_scale) for rule in (max_calibration, max_calibration_0_44))
    # Over codes that are all zero a scale has no effect.
    idle = (unpack(one.packed) % 8 == 0).unflatten(-1, (-1, 16)).all(-1)
    raw = torch.where(idle, common.scale.view(torch.uint8), one.scale.view(torch.uint8))
    alive = one._replace(scale=raw.view(E4M3))
    limit = block_errors(base, common) * (1 + ROUNDING)
    fine = (block_errors(base, alive) <= limit) | same_scales(base, alive)
    fine &= is_nearest(base, alive).unflatten(-1, (-1, 16)).all(-1)
    as_old = (one.scale.view(torch.uint8) == 0) & (old.scale.view(torch.uint8) == 0)
    as_old &= (unpack(one.packed) == unpack(old.packed)).unflatten(-1, (-1, 16)).all(-1)
    return ~(fine | as_old)


def odd_blocks(base: Tensor, one: Packed) -> int:
    """Blocks that are not those of max calibration under the global scale that is there, ties and zeros aside."""
    same = same_codes(base, one).unflatten(-1, (-1, 16)).all(-1) & same_scales(base, one)
    return int((~same).sum())


# Layouts


def up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def places(rows: int, columns: int) -> Tensor:
    """Where cuBLAS has the scale of each block, among ``up(rows, 128) * up(columns, 4)``: int64 [rows, columns]."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = (row // 128) * -(-columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


def readings(packed: Tensor, scale: Tensor, rows: int, columns: int) -> Iterator[tuple[Reading, Tensor, Tensor]]:
    """Every way to read stored bytes in which the padding is zero: codes low nibble first, and scales row by row.

    Args:
        packed: uint8, as stored.
        scale: Bytes of block scales, as stored.
        rows: N.
        columns: K.
    """
    blocks, raw = columns // 16, scale.contiguous().view(torch.uint8)
    codes = packed[:rows, : columns // 2]
    found = {}
    grids = {(rows, blocks), (up(rows, 16), blocks), (up(rows, 16), up(blocks, 16))}
    if tuple(raw.shape) in grids:
        found["linear"] = raw[:rows, :blocks], raw
    tiles = {(up(tall, 128), up(wide, 4)): (tall, wide) for tall, wide in grids}
    flat = (up(rows, 128) * up(blocks, 4),)
    other = {flat: (rows, blocks), (up(rows, 128) // 4, up(blocks, 4) * 4): (rows, blocks)}
    if tuple(raw.shape) in tiles | other:
        tall, wide = (tiles | other)[tuple(raw.shape)]
        found["128x4"] = raw.flatten()[places(up(tall, 128), up(wide, 4))][:rows, :blocks], raw
    for order, (lying, whole) in found.items():
        if int(lying.count_nonzero()) == int(whole.count_nonzero()):
            yield Reading("low", order), codes, lying.contiguous().view(E4M3)
            yield Reading("high", order), codes % 16 * 16 + codes // 16, lying.contiguous().view(E4M3)


def truths(base: Tensor, casts: tuple[torch.dtype, ...], stored: Packed) -> dict[Reading, tuple[str, Tensor]]:
    """For every reading of stored bytes the strongest verdict, over the casts of the base, and the decoded values.

    The first cast that gives all codes and block scales counts.
    """
    found = {}
    for reading, packed, scale in readings(stored.packed, stored.scale, *base.shape):
        one = Packed(packed, scale, stored.global_scale)
        verdicts = []
        for cast in (base.to(dtype) for dtype in casts):
            if bool(cast.any()):
                verdicts.append(strongest(cast, one))
            if any(equal(one, rule(cast, one.global_scale)) for rule in (max_calibration, max_calibration_0_44)):
                break
        found[reading] = min(verdicts, key=VERDICTS.index), dequantized(one)
    return found


# FP8


def truths_fp8(base: Tensor, casts: tuple[torch.dtype, ...], one: PackedFp8) -> set[str]:
    """The verdicts that hold, one for each rule that gives every code; what a scale cuts off is not looked at."""
    found = set()
    for dtype in casts:
        cast = base.to(dtype)
        for quotient, rounded in ((dtype, False), (torch.float32, False), (dtype, True)):
            if not rounded or float(one.scale.to(dtype)):
                made = fp8_under(cast, one.scale, quotient, rounded=rounded)
                if same_bits(made.codes, one.codes):
                    found.add("reproduced" if same_bits(one.scale, fp8_scale(cast)) else "nearest")
    return found
