"""NVFP4: E2M1 codes, two to a byte, under an E4M3 scale per 16 columns and a float32 scale per tensor.

The arithmetic is ModelOpt's, to the bit (``NVFP4QTensor``, modelopt/torch/quantization/qtensor/nvfp4_tensor.py, 0.47).
"""

import math
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.nvfp4.compiled import quantize_blocks
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
PART = 1 << 19  # so many values at a time: few enough for a core's cache, enough to outweigh the calls
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Split bytes into codes, the low nibble first.

    Args:
        packed: uint8 [..., K/2].

    Returns:
        uint8 [..., K] of 0..15; column 2j is the low nibble of byte j.

    Raises:
        ValueError: Not uint8.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, found {packed.dtype}")
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Put two codes into each byte, the first in the low nibble; the inverse of ``unpack_e2m1``.

    Args:
        codes: uint8 [..., K] of 0..15, K even.

    Returns:
        uint8 [..., K/2].

    Raises:
        ValueError: Not uint8, or K odd.
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(f"codes must be uint8 [..., K] with K even, found {codes.dtype} {list(codes.shape)}")
    pairs = codes.contiguous().view(torch.int16)  # the first code is in the low byte wherever torch runs
    return (pairs | (pairs >> 4)).to(torch.uint8)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Exchange the two codes of every byte; its own inverse.

    Args:
        packed: uint8, any shape.

    Raises:
        ValueError: Not uint8.
    """
    return swap_nibbles_(packed.clone(memory_format=torch.contiguous_format))


def swap_nibbles_(packed: Tensor) -> Tensor:
    """``swap_nibbles`` in place.

    Args:
        packed: uint8, any shape, contiguous.

    Raises:
        ValueError: Not uint8.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, found {packed.dtype}")
    if not packed.numel() or packed.numel() % 8 or packed.storage_offset() % 8:
        return packed.copy_((packed << 4) | (packed >> 4))
    words = packed.view(-1).view(torch.int64)  # eight bytes at a time
    high = (words >> 4).bitwise_and_(_LOW_NIBBLES)
    words.bitwise_and_(_LOW_NIBBLES).bitwise_left_shift_(4).bitwise_or_(high)
    return packed


def encode_e2m1(values: Tensor) -> Tensor:
    """Round to E2M1 codes: nearest, ties to even, saturating at 6.

    A negative value that rounds to zero keeps its sign (code 8); NaN becomes 7, as ModelOpt's searchsorted has it.

    Args:
        values: float32, any shape.

    Returns:
        uint8 codes of the same shape: bit 3 the sign, bits 0 to 2 the index into ``E2M1_VALUES``.
    """
    bits = values.contiguous().view(torch.int32).reshape(-1)
    # The key is the upper 16 bits; its last bit is also set where any lower bit is set. Bounds between neighbours have
    # at most three bits of mantissa. So this bit tells a value just above a bound from the bound itself, and no lower
    # bit tells more.
    low = (bits & 0xFFFF).clamp_(max=1)
    key = (bits >> 16).bitwise_and_(0xFFFF).bitwise_or_(low)
    return _codes_by_key(bits.device).index_select(0, key).reshape(values.shape)


@lru_cache
def _codes_by_key(device: torch.device) -> Tensor:
    """E2M1 codes [65536] of all values whose float32 has its lower 16 bits at zero."""
    values = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    magnitude = values.abs()
    # The bounds between neighbours; a tie goes to the even code, hence the alternation of > and >=.
    code = (magnitude > 0.25).to(torch.uint8)
    code += magnitude >= 0.75
    code += magnitude > 1.25
    code += magnitude >= 1.75
    code += magnitude > 2.5
    code += magnitude >= 3.5
    code += magnitude > 5.0
    code[values.isnan()] = 7
    return (code | ((values < 0).to(torch.uint8) << 3)).to(device)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of E2M1 codes.

    Args:
        codes: uint8 of 0..15, any shape.

    Returns:
        float32 of the same shape.
    """
    return _e2m1_values(codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


@lru_cache
def _e2m1_values(device: torch.device) -> Tensor:
    """float32 [16]: the values of all E2M1 codes."""
    return torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=torch.float32, device=device)


def block_scales(scale: Tensor, global_scale: Tensor) -> Tensor:
    """The factor of each code: block scale times global scale in float32, as ModelOpt forms the product.

    Args:
        scale: float8_e4m3fn [N, K/16].
        global_scale: float32 [].

    Returns:
        float32 [N, K], each block's scale repeated 16 times.
    """
    return (scale.to(torch.float32) * global_scale).repeat_interleave(BLOCK_SIZE, dim=-1)


def quantize_codes(weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Codes of a weight under given scales: ``e2m1(weight / (scale * global_scale))``, the quotient in float32.

    Args:
        weight: [N, K] in the dtype that was quantized.
        scale: float8_e4m3fn [N, K/16].
        global_scale: float32 [].

    Returns:
        uint8 codes [N, K].
    """
    blocks = weight.to(torch.float32).reshape(*scale.shape, BLOCK_SIZE)
    divisors = (scale.to(torch.float32) * global_scale).unsqueeze(-1)
    return encode_e2m1((blocks / divisors).flatten(-2))


def shared_global_scale(weights: Sequence[Tensor]) -> Tensor:
    """Global scale of one weight, or of a fused group that shares one: ``amax / (6 * 448)``.

    Args:
        weights: Any shapes and float dtypes.

    Returns:
        float32 [].
    """
    amax = torch.stack([weight.abs().amax().to(torch.float32) for weight in weights]).amax()
    return amax / (E2M1_MAX * E4M3_MAX)


def quantize_nvfp4(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight with max calibration, as ModelOpt 0.45 and newer does, byte for byte.

    The scale of a block is ``amax / (6 * global_scale)``, 1 for a block of zeros, clamped to [2^-9, 448] and rounded to
    E4M3; codes are ``quantize_codes``.

    Args:
        weight: [N, K] in BF16, F16 or F32; K a multiple of 16.
        global_scale: float32 [].

    Returns:
        Packed codes uint8 [N, K/2], low nibble first, and scales float8_e4m3fn [N, K/16], row-major.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    packed, scale, _ = _quantize_halves(weight, global_scale) or _quantize_parts(weight, global_scale)
    return packed, scale


def quantize_nvfp4_amax(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """``quantize_nvfp4``, and the largest magnitude of the weight, which is known on the way.

    Args:
        weight: As there, not empty.
        global_scale: Likewise.

    Returns:
        Codes and scales; and the largest magnitude, NaN if one is in the weight.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    if (done := _quantize_halves(weight, global_scale)) is not None:
        return done
    packed, scale, largest = _quantize_parts(weight, global_scale)
    return packed, scale, max_magnitude(torch.cat(largest))


def max_magnitude(values: Tensor) -> float:
    """The largest magnitude of values of any shape, not empty; NaN if one is among them."""
    if values.dtype in _SIXTEEN_BITS:  # bits without their sign are in the order of magnitudes, NaN above infinity
        return float((values.view(torch.int16) & 0x7FFF).amax().view(values.dtype))
    return float(values.abs().amax())


def _room(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the packed codes and the scales of a weight."""
    *rows, columns = weight.shape
    if columns % BLOCK_SIZE:
        raise ValueError(f"K must be a multiple of {BLOCK_SIZE}, found {list(weight.shape)}")
    packed = torch.empty(*rows, columns // 2, dtype=torch.uint8, device=weight.device)
    return packed, torch.empty(*rows, columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)


def _quantize_parts(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Codes, scales, and the largest magnitude of each block in the weight's dtype, in parts."""
    packed, scale = _room(weight)
    codes, scales, blocks = packed.view(-1, BLOCK_SIZE // 2), scale.view(-1), weight.reshape(-1, BLOCK_SIZE)
    with torch.inference_mode():
        step = PART // BLOCK_SIZE if weight.device.type == "cpu" else max(1, len(blocks))
        parts = [slice(top, top + step) for top in range(0, len(blocks), step)]
        largest = [_quantize(blocks[part], global_scale, codes[part], scales[part]) for part in parts]
    return packed, scale, largest


def _quantize(blocks: Tensor, global_scale: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Write packed codes [M, 8] and scales [M] of blocks [M, 16]; returns the largest magnitude [M] of each."""
    largest = _largest(blocks)
    scale.copy_(max_scales(largest, global_scale))
    divisors = e4m3_values(blocks.device)[scale.view(torch.uint8).int()] * global_scale
    packed.copy_(pack_e2m1(encode_e2m1(blocks.to(torch.float32) / divisors.unsqueeze(1))))
    return largest


def _quantize_halves(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """As ``_quantize_parts``, for values of 16 bits on the CPU, by comparing bits: a fifth of the time and no memory.

    Returns:
        Codes, scales and the largest magnitude of all; None for other weights, and where a value is NaN.
    """
    if weight.device.type != "cpu" or weight.dtype not in _SIXTEEN_BITS or not weight.numel():
        return None
    packed, scale = _room(weight)
    values, (by_amax, bounds) = weight.contiguous(), kernel_tables(weight.dtype, float(global_scale))
    tables, taken = (by_amax.data_ptr(), bounds.data_ptr()), (packed.data_ptr(), scale.data_ptr())
    bits = quantize_blocks(values.data_ptr(), *tables, *taken, scale.numel())
    # No tensor is made of it: each of torch's calls takes Python's lock anew.
    raw = struct.pack("<I", bits << 16) if weight.dtype == torch.bfloat16 else struct.pack("<H", bits)
    (amax,) = struct.unpack("<f" if len(raw) == 4 else "<e", raw)
    return None if math.isnan(amax) else (packed, scale, amax)


@lru_cache(maxsize=64)  # the most workers, each with a weight of its own; less than 3 MB
def kernel_tables(dtype: torch.dtype, global_scale: float) -> tuple[Tensor, Tensor]:
    """What ``quantize_blocks`` goes by: scale bytes by largest magnitude, and the bounds of codes by scale byte.

    A quotient in float32 grows with its dividend, so the values of a code are an interval, and bits that are in the
    order of magnitudes tell it. Its lower end is looked for by the very arithmetic of ``quantize_codes``, near where it
    is in float64.
    """
    factor = torch.tensor(global_scale, dtype=torch.float32)
    magnitudes = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    divisors = (e4m3_values(magnitudes.device) * factor).view(-1, 1, 1)
    middles = torch.tensor((2.0**-150, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), dtype=torch.float64).view(-1, 1)
    near = (divisors.to(torch.float64) * middles).to(dtype).view(torch.int16)
    # Two steps are more than the rounding of a quotient moves a bound; beyond NaN there is nothing.
    bits = (near.to(torch.int32) + torch.arange(-2, 3)).clamp_(0, (1 << 15) - 1)
    quotients = magnitudes[bits].to(torch.float32) / divisors
    reached = (encode_e2m1(quotients) & 7) >= torch.arange(len(middles)).view(-1, 1)
    reached[:, 0] = quotients[:, 0] > 0
    bounds = bits.masked_fill_(~reached, 0xFFFF).amin(dim=-1)
    return max_scales(magnitudes, factor).view(torch.uint8), bounds.to(torch.uint16).contiguous()


@lru_cache
def e4m3_values(device: torch.device) -> Tensor:
    """float32 [256]: the values of all E4M3 codes, as a table; torch decodes codes one by one."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).to(device)


def _largest(blocks: Tensor) -> Tensor:
    """Largest magnitude [M] of each block [M, 16]."""
    if blocks.dtype in _SIXTEEN_BITS:  # bits without their sign are in the order of magnitudes
        return (blocks.contiguous().view(torch.int16) & 0x7FFF).amax(dim=-1).view(blocks.dtype)
    return blocks.abs().amax(dim=-1)


def max_scales(amax: Tensor, global_scale: Tensor) -> Tensor:
    """The scale that max calibration gives to a block's largest magnitude, float8_e4m3fn of the same shape."""
    scale = amax.to(torch.float32) / (E2M1_MAX * global_scale)
    scale.masked_fill_(scale == 0, 1.0)
    return scale.clamp_(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize_nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Values of a packed weight: ``e2m1(code) * (scale * global_scale)``.

    Args:
        packed: uint8 [N, K/2], low nibble first.
        scale: float8_e4m3fn [N, K/16], row-major.
        global_scale: float32 [].

    Returns:
        float32 [N, K].
    """
    return decode_e2m1(unpack_e2m1(packed)) * block_scales(scale, global_scale)
