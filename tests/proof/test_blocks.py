"""The counts over blocks: exact blocks, ties, signs of zero, idle scales, searches and damage, each by itself."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from producers import (
    E4M3,
    NVFP4_PRODUCERS,
    Packed,
    block_errors,
    codes_under,
    four_over_six,
    is_nearest,
    max_calibration,
    max_calibration_0_44,
    max_scales,
    mse_sweep,
    pack,
    signed_zeros,
    unpack,
)
from torch import Tensor
from weights import DISTRIBUTIONS, weight

from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4
from modelopt_convert.proof.blocks import FEW, BlockTally, Difference

# Under this global scale, a block whose largest value is 6 has a scale of 256: codes are the values themselves.
PLAIN = torch.tensor(2.0**-8)
MIDDLES = [(low + high) / 2 for low, high in pairwise((0, 0.5, 1, 1.5, 2, 3, 4, 6))]


def tally(base: Tensor, one: Packed, *, height: int | None = None) -> BlockTally:
    """Count a weight [N, K], so many rows at a time, with the places of blocks in either form."""
    per_row = base.shape[1] // 16
    found = BlockTally(base.shape[1], one.global_scale)
    height = height or len(base)
    for top in range(0, len(base), height):
        rows = slice(top, top + height)
        packed, scale = quantize_nvfp4(base[rows], one.global_scale)
        blocks = base[rows].reshape(-1, 16)
        first = top * per_row
        found.add(
            blocks,
            (one.packed[rows].reshape(-1, 8), one.scale[rows].view(torch.uint8).reshape(-1)),
            (packed.view(-1, 8), scale.view(torch.uint8).reshape(-1)),
            first if top % 2 else torch.arange(first, first + len(blocks)),
        )
    return found


def block(value: float, *, count: int = 1, at: int = 3) -> Tensor:
    """float32 [count, 16]: 6 first, so that the divisor under ``PLAIN`` is 1, and one further value."""
    base = torch.zeros(count, 16)
    base[:, 0] = 6.0
    base[:, at] = value
    return base


def with_code(base: Tensor, code: int, *, at: int = 3) -> Packed:
    """Max calibration under ``PLAIN``, with another code in the first row."""
    one = max_calibration(base, PLAIN)
    codes = unpack(one.packed)
    codes[0, at] = code
    return one._replace(packed=pack(codes))


def with_scale(one: Packed, byte: int, *, row: int = 0, column: int = 0) -> Packed:
    """Another scale, under the same codes."""
    raw = one.scale.view(torch.uint8).clone()
    raw[row, column] = byte
    return one._replace(scale=raw.view(E4M3))


def steps_from(value: float, steps: int) -> float:
    """The float32 so many ulp away from zero, or towards it."""
    found = torch.tensor(value)
    for _ in range(abs(steps)):
        found = torch.nextafter(found, torch.tensor(math.copysign(math.inf, value if steps > 0 else -value)))
    return float(found)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("make", [max_calibration, max_calibration_0_44])
def test_max_calibration_is_exact(kind: str, make: Callable[[Tensor], Packed]) -> None:
    base = weight(kind, 33, 64, 0)
    one = make(base)
    found = tally(base, one, height=4)
    assert found.is_exact and found.is_tied and found.is_nearest and not found.is_damaged, vars(found)
    assert found.codes == found.codes_equal == 33 * 64 and found.scales == 33 * 4
    zero = int((one.scale.view(torch.uint8) == 0).sum())
    assert found.scales_zero == zero and found.scales_equal == found.scales - zero
    assert (found.odd_blocks, found.blocks_above, found.first) == (0, 0, None)


def test_zero_bytes_are_explained_by_underflow_alone() -> None:
    """2^-10 is half of the smallest scale, and rounds to zero; a larger wanted scale does not."""
    base = torch.zeros(2, 16)
    base[0] = 6 * 2.0**-10 * PLAIN
    base[1] = 6 * steps_from(2.0**-10, 4) * PLAIN
    codes = torch.full((2, 8), 0x77, dtype=torch.uint8)
    one = Packed(codes, torch.zeros(2, 1, dtype=torch.uint8).view(E4M3), PLAIN)
    found = tally(base, one)
    assert (found.scales, found.scales_equal, found.scales_zero, found.odd_blocks) == (2, 0, 1, 1)
    assert found.first is not None and found.first.row == 1


def test_a_zero_byte_excuses_no_other_code() -> None:
    base = torch.full((1, 16), 1e-9)
    codes = torch.full((1, 8), 0x77, dtype=torch.uint8)
    codes[0, 2] = 0x76
    found = tally(base, Packed(codes, torch.zeros(1, 1, dtype=torch.uint8).view(E4M3), PLAIN))
    assert found.scales_zero == 0 and found.wrong_codes == 1 and not found.is_tied


@pytest.mark.parametrize("low", range(7))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("steps", "is_tie"), [(0, True), (1, True), (-1, True), (8, False), (-8, False)])
def test_a_tie_is_the_other_neighbour_of_a_midpoint(low: int, sign: int, steps: int, is_tie: bool) -> None:
    base = block(steps_from(sign * MIDDLES[low], steps))
    nearest = int(unpack(max_calibration(base, PLAIN).packed)[0, 3])
    assert nearest & 7 in (low, low + 1) and nearest >> 3 == (sign < 0)
    other = (low + low + 1 - (nearest & 7)) | (nearest & 8)
    found = tally(base, with_code(base, other))
    assert (found.codes_equal, found.codes_tied, found.wrong_codes) == (15, int(is_tie), int(not is_tie))
    assert not found.is_exact and found.is_tied is found.is_nearest is is_tie
    assert found.odd_blocks == int(not is_tie)


@pytest.mark.parametrize(("middle", "code"), [(0.25, 0), (5.0, 6)])
@pytest.mark.parametrize(("steps", "is_tie"), [(2, True), (3, False)])
def test_a_tie_ends_at_two_ulp(middle: float, code: int, steps: int, is_tie: bool) -> None:
    """Also of a value just above a power of two, where an ulp is largest beside it."""
    base = block(steps_from(middle, steps))
    assert bool(tally(base, with_code(base, code)).codes_tied) is is_tie


@pytest.mark.parametrize(
    ("value", "code"),
    [(2.5, 3), (2.5, 6), (2.5, 5 | 8), (-2.5, 5), (-0.25, 1), (0.25, 1 | 8), (0.75, 2 | 8), (5.0, 7 | 8)],
)
def test_at_a_midpoint_other_codes_are_wrong(value: float, code: int) -> None:
    """Those that are no neighbour, and those of the other sign: +0.5 is not a neighbour of -0.25."""
    base = block(value)
    found = tally(base, with_code(base, code))
    assert (found.codes_tied, found.zero_signs, found.wrong_codes, found.odd_blocks) == (0, 0, 1, 1)
    nearest = int(unpack(max_calibration(base, PLAIN).packed)[0, 3])
    assert found.first == Difference(0, 3, "weight", nearest, code)


@pytest.mark.parametrize("code", [0, 8])
def test_zero_may_have_either_sign_at_its_midpoint(code: int) -> None:
    """0.75 rounds up to even; of 0.25's two neighbours the lower is even, so a base just above gives 1."""
    base = block(steps_from(0.25, 1))
    assert int(unpack(max_calibration(base, PLAIN).packed)[0, 3]) == 1
    assert tally(base, with_code(base, code)).codes_tied == 1


def test_signs_of_zero_are_counted_and_change_nothing() -> None:
    base = weight("sparse", 64, 64, 0)
    one = signed_zeros(base)
    found = tally(base, one)
    flipped = int((unpack(one.packed) != unpack(max_calibration(base).packed)).sum())
    assert found.zero_signs == flipped > 0 and found.codes_equal == found.codes - flipped
    assert not found.is_exact and found.is_tied and found.odd_blocks == 0
    # Where the value is none, a zero is another code.
    base = block(2.0)
    assert tally(base, with_code(base, 8)).wrong_codes == 1


@pytest.mark.parametrize(("steps", "is_tie"), [(0, True), (2, True), (-2, True), (8, False), (-8, False)])
def test_a_scale_may_be_the_neighbour_at_its_midpoint(steps: int, is_tie: bool) -> None:
    """272 lies between the scales 256 and 288."""
    base = block(steps_from(6 * 272 / 256, steps))
    base[:, 0] = base[:, 3]
    common = float(max_calibration(base, PLAIN).scale[0, 0].float())
    other = torch.tensor([[256 + 288 - common]]).to(E4M3)
    found = tally(base, codes_under(base, other, PLAIN))
    assert (found.scales_equal, found.scales_tied, found.wrong_codes) == (0, int(is_tie), 0)
    assert found.is_tied is is_tie and found.odd_blocks == int(not is_tie) and not found.is_exact
    if not is_tie:
        assert found.first is not None and found.first.role == "weight_scale"


@pytest.mark.parametrize("other", [320.0, 240.0])
def test_at_a_midpoint_other_scales_are_no_tie(other: float) -> None:
    base = block(6 * 272 / 256)
    found = tally(base, codes_under(base, torch.tensor([[other]]).to(E4M3), PLAIN))
    assert found.scales_tied == 0 and found.odd_blocks == 1


def test_a_code_under_a_tied_scale_is_judged_under_that_scale() -> None:
    base = block(1.0)
    base[:, 0] = 6 * 272 / 256
    other = codes_under(base, torch.tensor([[288.0]]).to(E4M3), PLAIN)
    codes = unpack(other.packed)
    codes[0, 3] ^= 1
    found = tally(base, other._replace(packed=pack(codes)))
    assert (found.scales_tied, found.wrong_codes, found.odd_blocks) == (1, 1, 1) and not found.is_tied


@pytest.mark.parametrize(("byte", "is_odd"), [(0, False), (0x30, True)])
def test_a_scale_over_zeros_is_idle(byte: int, is_odd: bool) -> None:
    """No block of zeros has another value for it; only a zero byte is what a producer is known to write."""
    base = torch.zeros(200, 16)
    base[1:, 0] = 6.0
    found = tally(base, with_scale(max_calibration(base, PLAIN), byte))
    assert (found.scales_idle, found.scales_equal, found.scales_zero, found.scales_tied) == (1, 199, 0, 0)
    assert (found.wrong_codes, found.blocks_above, found.odd_blocks) == (0, 0, int(is_odd))
    assert found.is_nearest and not found.is_tied and found.is_damaged is is_odd


def test_zero_codes_over_values_are_wrong_whatever_the_scale() -> None:
    base = block(2.0)
    one = Packed(torch.zeros(1, 8, dtype=torch.uint8), torch.tensor([[0x20]], dtype=torch.uint8).view(E4M3), PLAIN)
    found = tally(base, one)
    assert (found.scales_idle, found.wrong_codes, found.blocks_above) == (1, 2, 1) and not found.is_nearest


@pytest.mark.parametrize(("count", "is_damaged"), [(100, False), (101, True)])
def test_few_odd_blocks_are_damage(count: int, is_damaged: bool) -> None:
    assert FEW == 1 / 100
    base = block(2.0, count=count)
    found = tally(base, with_code(base, 5))
    assert found.odd_blocks == 1 and found.is_damaged is is_damaged
    assert not tally(base, max_calibration(base, PLAIN)).is_damaged


@pytest.mark.parametrize("kind", ["gaussian", "outlier_channels"])
@pytest.mark.parametrize("step", [-9, -2, -1, 1, 2, 9])
def test_blocks_above_are_those_whose_error_is_larger(kind: str, step: int) -> None:
    """Against sums in float64 made anew; errors a few percent larger are among them."""
    base = weight(kind, 64, 256, 3)
    common = max_calibration(base)
    raw = (common.scale.view(torch.uint8).int() + step).clamp(1, 126).to(torch.uint8)
    one = codes_under(base, raw.view(E4M3), common.global_scale)
    least, error = block_errors(base, common), block_errors(base, one)
    other = raw != common.scale.view(torch.uint8)
    tied = torch.zeros_like(other)
    for beside in (-1, 1):
        neighbour = (common.scale.view(torch.uint8).int() + beside).clamp(1, 126).to(torch.uint8).view(E4M3)
        middle = (common.scale.double() + neighbour.double()) / 2
        at_middle = (max_scales(base, common.global_scale) / middle - 1).abs() <= 2.0**-22
        tied |= other & (step == beside) & at_middle
        beside_error = block_errors(base, codes_under(base, neighbour, common.global_scale))
        least = torch.where(at_middle, torch.maximum(least, beside_error), least)
    above = other & ~tied & (error > least * 1.00002)
    close = above & (error < least * 1.02)
    found = tally(base, one)
    assert found.wrong_codes == 0 and found.blocks_above == int(above.sum()) > 0
    assert found.scales_tied == int(tied.sum())
    assert abs(step) > 2 or bool(close.any())
    assert not found.is_nearest and not found.is_tied


def test_a_plain_search_is_nearest_and_no_tie() -> None:
    base = weight("outlier_channels", 64, 256, 0)
    found = tally(base, four_over_six(base))
    assert found.is_nearest and not found.is_tied and not found.is_damaged
    assert found.blocks_above == found.wrong_codes == 0 < found.odd_blocks


@pytest.mark.parametrize("name", NVFP4_PRODUCERS)
def test_wrong_codes_are_those_that_are_not_the_nearest(name: str) -> None:
    for kind in ("gaussian", "outlier_channels", "many_ties"):
        base = weight(kind, 32, 128, 1)
        one = NVFP4_PRODUCERS[name].make(base)
        assert tally(base, one).wrong_codes == int((~is_nearest(base, one)).sum())


@pytest.mark.parametrize("height", [1, 2, 3, 9])
@pytest.mark.parametrize("row", [0, 4, 8])
def test_the_first_difference_is_named_wherever_it_is(height: int, row: int) -> None:
    base = weight("gaussian", 9, 64, 0)
    one = max_calibration(base)
    codes = unpack(one.packed)
    nearest = int(codes[row, 37])
    codes[row, 37] ^= 4
    codes[8, 60] ^= 4
    found = tally(base, one._replace(packed=pack(codes)), height=height)
    assert found.first == Difference(row, 37, "weight", nearest, nearest ^ 4)
    assert f"row {row}, column 37: expected code {nearest}, found {nearest ^ 4}" == found.first.in_words()
    byte = int(one.scale.view(torch.uint8)[row, 2])
    found = tally(base, with_scale(one, byte ^ 8, row=row, column=2), height=height)
    assert found.first == Difference(row, 32, "weight_scale", byte, byte ^ 8)
    assert f"row {row}, columns 32 to 47: expected the scale byte {byte:#04x}" in found.first.in_words()
    assert found.scales_equal == found.scales - 1


def tied_at(middle: float) -> Tensor:
    """A block whose scale is wanted at a midpoint under ``PLAIN``; random, for errors that differ."""
    base = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) * 3
    base[:, 0] = 6 * middle / 256
    return base


@pytest.mark.parametrize(("middle", "even", "other"), [(272.0, 256.0, 288.0), (304.0, 320.0, 288.0)])
def test_at_a_midpoint_a_search_may_have_begun_from_the_other_neighbour(
    middle: float, even: float, other: float
) -> None:
    """Four over six: a block keeps 1.5 times the scale if that is better than the scale as it was rounded there."""
    base = tied_at(middle)
    scales = {value: torch.full((64, 1), value).to(E4M3) for value in (even, other, 416.0)}
    assert torch.equal(max_calibration(base, PLAIN).scale.float(), scales[even].float())
    errors = {value: block_errors(base, codes_under(base, scale, PLAIN)) for value, scale in scales.items()}
    searched = codes_under(base, scales[416.0], PLAIN)
    limit = torch.maximum(errors[even], errors[other])
    above = int((errors[416.0] > limit).sum())
    assert int((errors[416.0] > errors[even]).sum()) > above < int((errors[416.0] > errors[other]).sum())
    assert tally(base, searched).blocks_above == above
    # Away from the midpoint there is one neighbour.
    base[:, 0] *= 1 - 1e-5
    even_error = block_errors(base, max_calibration(base, PLAIN))
    searched = codes_under(base, scales[416.0], PLAIN)
    assert tally(base, searched).blocks_above == int((block_errors(base, searched) > even_error).sum())


@pytest.mark.parametrize("row", [0, 5, 30, 63])
@pytest.mark.parametrize("height", [4, 64])
def test_damage_of_a_searched_weight_is_named_and_not_its_search(row: int, height: int) -> None:
    base = weight("gaussian", 64, 256, 0)
    one = mse_sweep(base)
    common = max_calibration(base, one.global_scale)
    searched = tally(base, one, height=height)
    assert searched.is_nearest and searched.first is not None and searched.first.row == 0
    codes = unpack(one.packed)
    nearest = int(codes[row, 100])
    codes[row, 100] ^= 4
    codes[63, 250] ^= 4
    found = tally(base, one._replace(packed=pack(codes)), height=height)
    assert found.first == Difference(row, 100, "weight", nearest, nearest ^ 4)
    # A scale that is not searched, and too large for its block; all codes are the nearest under it.
    raw = one.scale.view(torch.uint8).clone()
    raw[row, 7] = common.scale.view(torch.uint8)[row, 7] + 12
    raw[63, 15] = common.scale.view(torch.uint8)[63, 15] + 12
    found = tally(base, codes_under(base, raw.view(E4M3), one.global_scale), height=height)
    assert found.wrong_codes == 0 and found.first is not None
    assert (found.first.row, found.first.column, found.first.role) == (row, 112, "weight_scale")


@pytest.mark.parametrize("seed", range(4))
def test_a_code_is_wrong_also_where_the_searched_scale_saves_more_than_it_loses(seed: int) -> None:
    base = weight("gaussian", 64, 256, seed)
    one = mse_sweep(base)
    common = max_calibration(base, one.global_scale)
    saved = block_errors(base, common) - block_errors(base, one)
    row, block = divmod(int(saved.argmax()), saved.shape[1])
    codes = unpack(one.packed)
    within = int((codes[row, block * 16 : block * 16 + 16] & 7).argmin())
    column = block * 16 + within
    nearest = int(codes[row, column])
    codes[row, column] ^= 1
    found = tally(base, one._replace(packed=pack(codes)))
    assert found.wrong_codes == 1 and found.blocks_above == 0
    assert found.first == Difference(row, column, "weight", nearest, nearest ^ 1)
