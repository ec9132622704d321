"""Packed weights as their producers make them, in plain torch. The formats are spelled out anew here, on purpose.

Every function takes a base weight [N, K] in BF16, F16 or F32. tests/proof/test_producers.py holds ``max_calibration``,
``compressed_group`` and the rules of FP8 against ModelOpt itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
BLOCK = 16
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2
SMALLEST_SCALE = 2.0**-9


class Packed(NamedTuple):
    """A packed NVFP4 weight.

    Attributes:
        packed: uint8 [N, K/2], the low nibble first.
        scale: float8_e4m3fn [N, K/16], row by row.
        global_scale: float32 [].
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor


class PackedFp8(NamedTuple):
    """A weight in FP8: float8_e4m3fn [N, K], and float32 []."""

    codes: Tensor
    scale: Tensor


# Codes


def encode(quotient: Tensor, *, ties: str = "even") -> Tensor:
    """E2M1 codes of quotients, saturating; NaN becomes 7. ``ties`` go to the "even" code, or "away" from zero."""
    magnitude = quotient.abs()
    bounds = MIDPOINTS.to(quotient.dtype)
    code = torch.bucketize(magnitude, bounds, right=ties == "away")
    if ties == "even":
        code += torch.isin(magnitude, bounds[1::2])
    code[magnitude.isnan()] = 7
    return (code + 8 * (quotient < 0)).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed % 16, packed // 16), -1).flatten(-2)


def decode(codes: Tensor) -> Tensor:
    """float64 values of codes."""
    return torch.cat((VALUES, -VALUES)).double()[codes.long()]


def e4m3(values: Tensor) -> Tensor:
    """Rounded to E4M3, saturating at 448."""
    return values.float().clamp(max=448).to(E4M3)


def each(scale: Tensor) -> Tensor:
    """Something per block [N, K/16] as something per column [N, K]."""
    return scale.repeat_interleave(BLOCK, -1)


def amax_of_blocks(weight: Tensor) -> Tensor:
    """float32 [N, K/16]."""
    return weight.float().abs().unflatten(-1, (-1, BLOCK)).amax(-1)


def own_global_scale(weight: Tensor) -> Tensor:
    """float32 [], by max calibration of this weight alone."""
    return weight.float().abs().max() / (6 * 448)


def codes_under(weight: Tensor, scale: Tensor, global_scale: Tensor) -> Packed:
    """The codes that ModelOpt gives under these scales: true division by the product in float32, ties to even."""
    return Packed(pack(encode(weight.float() / each(scale.float() * global_scale))), scale, global_scale)


def dequantized(one: Packed) -> Tensor:
    """float64 [N, K]."""
    return decode(unpack(one.packed)) * each(one.scale.double()) * one.global_scale.double()


def block_errors(weight: Tensor, one: Packed, importance: Tensor | None = None) -> Tensor:
    """Squared error of every block, float64 [N, K/16]; ``importance`` [K] weighs the columns."""
    squares = (weight.double() - dequantized(one)).square()
    if importance is not None:
        squares = squares * importance.double()
    return squares.unflatten(-1, (-1, BLOCK)).sum(-1)


def is_nearest(weight: Tensor, one: Packed) -> Tensor:
    """Whether a code is the nearest to its value under the scales that are there, bool [N, K].

    Within 2 ulp of float32 of a midpoint both neighbours are; the two distances then differ by twice that.
    """
    quotient = weight.double() / each(one.scale.double() * one.global_scale.double())
    distance = (quotient - decode(unpack(one.packed))).abs()
    best = (quotient[..., None] - torch.cat((VALUES, -VALUES)).double()).abs().amin(-1)
    return distance <= best * (1 + 1e-12) + quotient.abs() * 2.0**-21


# Max calibration


def max_scales(weight: Tensor, global_scale: Tensor) -> Tensor:
    """Block scales of max calibration before their rounding, float32 [N, K/16]; 1 for blocks of zeros."""
    scale = amax_of_blocks(weight) / (6 * global_scale)
    return torch.where(scale == 0, 1.0, scale)


def max_calibration(weight: Tensor, global_scale: Tensor | None = None) -> Packed:
    """ModelOpt of today: scales that would round to zero are the smallest that E4M3 has."""
    g = own_global_scale(weight) if global_scale is None else global_scale
    return codes_under(weight, e4m3(max_scales(weight, g).clamp(min=SMALLEST_SCALE)), g)


def max_calibration_0_44(weight: Tensor, global_scale: Tensor | None = None) -> Packed:
    """ModelOpt up to 0.44: no lower clamp, so scales that underflow are zero bytes; the codes are then 7 and 15."""
    g = own_global_scale(weight) if global_scale is None else global_scale
    return codes_under(weight, e4m3(max_scales(weight, g)), g)


def fused_group(weights: Sequence[Tensor]) -> list[Packed]:
    """Members of one fused group: they share the global scale of the largest."""
    shared = torch.stack([own_global_scale(weight) for weight in weights]).max()
    return [max_calibration(weight, shared) for weight in weights]


def compressed_group(weights: Sequence[Tensor]) -> list[Packed]:
    """A fused group under ``mtq.compress``: codes and scales are made under each member's own global scale.

    When the export unifies these, the scales of all but the largest are rounded once more; the codes stay.
    """
    alone = [max_calibration(weight) for weight in weights]
    shared = torch.stack([one.global_scale for one in alone]).max()
    return [
        one._replace(
            scale=e4m3((one.scale.float() * one.global_scale / shared).clamp(min=SMALLEST_SCALE)), global_scale=shared
        )
        for one in alone
    ]


# Other last-bit rounding, under the same scales


def by_reciprocal(weight: Tensor) -> Packed:
    """Multiplies by the reciprocal of the product of the scales."""
    one = max_calibration(weight)
    quotient = weight.float() * each(1 / (one.scale.float() * one.global_scale))
    return one._replace(packed=pack(encode(quotient)))


def in_two_steps(weight: Tensor) -> Packed:
    """Divides by the global scale, then by the block's."""
    one = max_calibration(weight)
    return one._replace(packed=pack(encode(weight.float() / one.global_scale / each(one.scale.float()))))


def in_two_steps_by_reciprocal(weight: Tensor) -> Packed:
    """Multiplies by the reciprocal of the global scale, then divides by the block's."""
    one = max_calibration(weight)
    return one._replace(packed=pack(encode(weight.float() * (1 / one.global_scale) / each(one.scale.float()))))


def ties_away(weight: Tensor) -> Packed:
    """Rounds ties away from zero."""
    one = max_calibration(weight)
    quotient = weight.float() / each(one.scale.float() * one.global_scale)
    return one._replace(packed=pack(encode(quotient, ties="away")))


def scales_in_two_steps(weight: Tensor) -> Packed:
    """Forms amax / 6 / g for the block scales: some at a midpoint of E4M3 are the neighbour."""
    g = own_global_scale(weight)
    scale = amax_of_blocks(weight) / 6 * (1 / g)
    return codes_under(weight, e4m3(torch.where(scale == 0, 1.0, scale).clamp(min=SMALLEST_SCALE)), g)


def by_bf16_product(weight: Tensor) -> Packed:
    """Rounds the product of the scales to BF16 before it divides."""
    one = max_calibration(weight)
    product = (one.scale.float() * one.global_scale).bfloat16().float()
    return one._replace(packed=pack(encode(weight.float() / each(product))))


def signed_zeros(weight: Tensor, seed: int = 0) -> Packed:
    """Half of the codes 0 and 8 are the other one: both mean zero."""
    one = max_calibration(weight)
    codes = unpack(one.packed)
    flipped = (codes % 8 == 0) & (torch.rand(codes.shape, generator=seeded(seed)) < 0.5)
    return one._replace(packed=pack(codes ^ (flipped * 8).to(torch.uint8)))


# Searched scales


def searched(weight: Tensor, importance: Tensor | None = None, *, reach: int = 8) -> Packed:
    """For every block the scale of least error among the neighbours of max calibration's; at equal errors its own."""
    best = max_calibration(weight)
    g, start = best.global_scale, best.scale.view(torch.uint8).int()
    least = block_errors(weight, best, importance)
    for step in sorted(range(-reach, reach + 1), key=abs)[1:]:
        one = codes_under(weight, (start + step).clamp(1, 126).to(torch.uint8).view(E4M3), g)
        best, least = _better_blocks(weight, best, one, least, importance)
    return best


def mse_sweep(weight: Tensor) -> Packed:
    """Block scales searched by plain squared error."""
    return searched(weight)


def ten_scales(weight: Tensor, global_scale: Tensor | None = None, importance: Tensor | None = None) -> Packed:
    """mopt's own sweep, by the words of its docstring: ten neighbours, the own one first and then from the largest.

    Errors are under the product of the scales in float32, and are added in halves, which decides ties.
    """
    best = max_calibration(weight, global_scale)
    g, start = best.global_scale, best.scale.view(torch.uint8).int()
    counts = torch.ones(weight.shape[1]) if importance is None else importance
    least = torch.full(start.shape, torch.inf, dtype=torch.float64)
    for step in (0, 7, 6, 5, 4, 3, 2, 1, -1, -2):
        one = codes_under(weight, (start + step).clamp(1, 126).to(torch.uint8).view(E4M3), g)
        values = decode(unpack(one.packed)) * each((one.scale.float() * g).double())
        parts = ((values - weight.double()).square() * counts.double()).unflatten(-1, (-1, BLOCK))
        while parts.shape[-1] > 1:
            parts = torch.stack(parts.chunk(2, -1)).sum(0)
        better = parts[..., 0] < least
        codes = torch.where(each(better), unpack(one.packed), unpack(best.packed))
        raw = torch.where(better, one.scale.view(torch.uint8), best.scale.view(torch.uint8))
        best, least = Packed(pack(codes), raw.view(E4M3), g), torch.where(better, parts[..., 0], least)
    return best


def four_over_six(weight: Tensor, *, largest_scale: float = 448.0) -> Packed:
    """A block's largest value may become 4 instead of 6, where its squared error is then less.

    Args:
        weight: The base.
        largest_scale: What the largest block scale becomes; ModelOpt takes 256, so that a scale for 4 has room.
    """
    g = weight.float().abs().max() / (6 * largest_scale)
    six = max_calibration(weight, g)
    wider = max_scales(weight, g) * 1.5
    wider = torch.where((wider > 448) | (amax_of_blocks(weight) == 0), six.scale.float(), wider)
    four = codes_under(weight, e4m3(wider.clamp(min=SMALLEST_SCALE)), g)
    return _better_blocks(weight, six, four, block_errors(weight, six), None)[0]


def four_over_six_modelopt(weight: Tensor) -> Packed:
    """The same with ModelOpt's choice of the global scale."""
    return four_over_six(weight, largest_scale=256.0)


def larger_global_scale(weight: Tensor, factor: float = 1.7) -> Packed:
    """Max calibration under a global scale that is larger than the weight asks for; nothing is clipped."""
    return max_calibration(weight, own_global_scale(weight) * factor)


def weighted_search(weight: Tensor, seed: int = 0) -> Packed:
    """Block scales searched by an error in which some columns count more, as by the activations' sizes."""
    return searched(weight, torch.randn(weight.shape[1], generator=seeded(seed)).mul(1.5).exp())


def _better_blocks(
    weight: Tensor, best: Packed, one: Packed, least: Tensor, importance: Tensor | None
) -> tuple[Packed, Tensor]:
    errors = block_errors(weight, one, importance)
    better = errors < least
    codes = torch.where(each(better), unpack(one.packed), unpack(best.packed))
    raw = torch.where(better, one.scale.view(torch.uint8), best.scale.view(torch.uint8))
    return Packed(pack(codes), raw.view(E4M3), best.global_scale), torch.where(better, errors, least)


# Other weights than the base's


def gptq(weight: Tensor, seed: int = 0) -> Packed:
    """Column by column, each one's error spread over those to come; the scales are max calibration's."""
    columns = weight.shape[1]
    mixed = torch.randn(columns, columns, generator=seeded(seed), dtype=torch.float64) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=seeded(seed + 1), dtype=torch.float64)
    inputs = inputs @ (torch.eye(columns, dtype=torch.float64) + mixed)
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    spread = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    one = max_calibration(weight)
    product = each(one.scale.float() * one.global_scale).double()
    left, codes = weight.double(), torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(columns):
        codes[:, column] = encode(left[:, column] / product[:, column])
        error = (left[:, column] - decode(codes[:, column]) * product[:, column]) / spread[column, column]
        left[:, column:] -= error[:, None] * spread[column, column:]
    return one._replace(packed=pack(codes))


def trained(weight: Tensor, seed: int = 0, noise: float = 0.02) -> Tensor:
    """The weight after a little more training, in its dtype."""
    more = 1 + noise * torch.randn(weight.shape, generator=seeded(seed))
    return (weight.float() * more).to(weight.dtype)


def lora_merged(weight: Tensor, seed: int = 0, *, rank: int = 4, strength: float = 0.05) -> Tensor:
    """The weight with a LoRA merged into it, in its dtype."""
    up = torch.randn(weight.shape[0], rank, generator=seeded(seed))
    down = torch.randn(rank, weight.shape[1], generator=seeded(seed + 1))
    change = up @ down
    return (weight.float() + change * (strength * weight.float().norm() / change.norm())).to(weight.dtype)


def qat(weight: Tensor, seed: int = 0) -> Packed:
    return max_calibration(trained(weight, seed))


def lora(weight: Tensor, seed: int = 0) -> Packed:
    return max_calibration(lora_merged(weight, seed))


# FP8


def fp8_scale(weight: Tensor) -> Tensor:
    return weight.float().abs().max() / 448


def fp8_under(
    weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, *, rounded: bool = False
) -> PackedFp8:
    """Codes of the quotient, rounded to ``dtype`` before E4M3.

    Args:
        weight: The base.
        scale: float32 [].
        dtype: BF16 and F16 are what the exporter loads a model in; it divides in F32 where the first parameter is F32.
        rounded: Whether the divisor is rounded to ``dtype`` too, as ``mtq.compress`` has it.
    """
    divisor = scale.to(dtype).float() if rounded else scale
    return PackedFp8(e4m3_signed((weight.to(dtype).float() / divisor).to(dtype)), scale)


def e4m3_signed(values: Tensor) -> Tensor:
    return values.float().clamp(-448, 448).to(E4M3)


def fp8_bf16(weight: Tensor) -> PackedFp8:
    return fp8_under(weight, fp8_scale(weight))


def fp8_f16(weight: Tensor) -> PackedFp8:
    return fp8_under(weight, fp8_scale(weight), torch.float16)


def fp8_f32(weight: Tensor) -> PackedFp8:
    return fp8_under(weight, fp8_scale(weight), torch.float32)


def fp8_compressed(weight: Tensor) -> PackedFp8:
    """``mtq.compress``: the divisor is rounded to the dtype of the weight."""
    return fp8_under(weight, fp8_scale(weight), weight.dtype, rounded=True)


def fp8_other_scale(weight: Tensor, factor: float = 1.02) -> PackedFp8:
    """Quantized anew under another scale."""
    return fp8_under(weight, fp8_scale(weight) * factor)


def fp8_stretched(weight: Tensor, factor: float = 1.02) -> PackedFp8:
    """The old codes under another scale: every value is off by the factor."""
    return fp8_bf16(weight)._replace(scale=fp8_scale(weight) * factor)


def fp8_qat(weight: Tensor, seed: int = 0) -> PackedFp8:
    return fp8_bf16(trained(weight, seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# By name


@dataclass(frozen=True, slots=True)
class Producer:
    """A way to make a packed weight, and the weakest verdict that it can come to.

    Where the way makes no difference the verdict is a stronger one, as on ternary weights or where no value is a tie.
    """

    make: Callable[[Tensor], Packed]
    verdict: str


VERDICTS = ("reproduced", "reproduced but for ties", "nearest", "near", "mismatch")  # the strongest first

NVFP4_PRODUCERS = {
    "max calibration": Producer(max_calibration, "reproduced"),
    "max calibration, 0.44": Producer(max_calibration_0_44, "reproduced"),
    "by reciprocal": Producer(by_reciprocal, "reproduced but for ties"),
    "in two steps": Producer(in_two_steps, "reproduced but for ties"),
    "in two steps by reciprocal": Producer(in_two_steps_by_reciprocal, "reproduced but for ties"),
    "ties away": Producer(ties_away, "reproduced but for ties"),
    "scales in two steps": Producer(scales_in_two_steps, "reproduced but for ties"),
    "signed zeros": Producer(signed_zeros, "reproduced but for ties"),
    "ten scales": Producer(ten_scales, "nearest"),
    "MSE sweep": Producer(mse_sweep, "nearest"),
    "four over six": Producer(four_over_six, "nearest"),
    "four over six, ModelOpt's": Producer(four_over_six_modelopt, "nearest"),
    "larger global scale": Producer(larger_global_scale, "nearest"),
    "weighted search": Producer(weighted_search, "near"),
    "product in BF16": Producer(by_bf16_product, "near"),
    "GPTQ": Producer(gptq, "near"),
    "QAT": Producer(qat, "near"),
    "LoRA": Producer(lora, "near"),
}


@dataclass(frozen=True, slots=True)
class Fp8Producer:
    """The same for FP8."""

    make: Callable[[Tensor], PackedFp8]
    verdict: str


FP8_PRODUCERS = {
    "quotient in BF16": Fp8Producer(fp8_bf16, "reproduced"),
    "quotient in F16": Fp8Producer(fp8_f16, "reproduced"),
    "quotient in F32": Fp8Producer(fp8_f32, "reproduced"),
    "compressed": Fp8Producer(fp8_compressed, "reproduced"),
    "another scale": Fp8Producer(fp8_other_scale, "nearest"),
    "stretched": Fp8Producer(fp8_stretched, "near"),
    "QAT": Fp8Producer(fp8_qat, "near"),
}
