"""NVFP4: E2M1 codes, two to a byte, under an E4M3 scale per 16 columns and a float32 scale per tensor.

The arithmetic is ModelOpt's, to the bit (``NVFP4QTensor``, modelopt/torch/quantization/qtensor/nvfp4_tensor.py, 0.47).
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
_PART = 1 << 19  # so many values at a time: few enough for a core's cache, enough to outweigh the calls
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_HALF = 2.0**-14  # brings E2M1's exponents to those of float16: its subnormal value to float16's subnormal ones
_SURE = 6.99  # values below are not beyond the largest code by more than float16 shows
_E2M1_SHIFT = 9  # from the last place of E2M1 to that of float16
_TIE = 1 << (_E2M1_SHIFT - 1)
_UNSURE = 0x100  # flags a scale byte: not all values under it can be encoded by way of float16


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
    table = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=torch.float32, device=codes.device)
    return table[codes.long()]


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
    packed, scale, _ = _quantized(weight, global_scale)
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
    packed, scale, largest = _quantized(weight, global_scale)
    return packed, scale, max_magnitude(torch.cat(largest))


def max_magnitude(values: Tensor) -> float:
    """The largest magnitude of values of any shape, not empty; NaN if one is among them."""
    if values.dtype in _SIXTEEN_BITS:  # bits without their sign are in the order of magnitudes, NaN above infinity
        return float((values.view(torch.int16) & 0x7FFF).amax().view(values.dtype))
    return float(values.abs().amax())


def _quantized(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Codes, scales, and the largest magnitude of each block in the weight's dtype, in parts."""
    if weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"K must be a multiple of {BLOCK_SIZE}, found {list(weight.shape)}")
    blocks = weight.reshape(-1, BLOCK_SIZE)
    packed = torch.empty(len(blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(blocks), dtype=torch.float8_e4m3fn, device=weight.device)
    on_cpu = weight.device.type == "cpu"
    step = _PART // BLOCK_SIZE if on_cpu else max(1, len(blocks))
    largest = []
    with torch.inference_mode():
        for top in range(0, len(blocks), step):
            part = slice(top, top + step)
            done = None
            if on_cpu and weight.dtype in _SIXTEEN_BITS:
                done = _quantize_halves(blocks[part], global_scale, packed[part], scale[part])
            largest.append(_quantize(blocks[part], global_scale, packed[part], scale[part]) if done is None else done)
    return packed.reshape(*weight.shape[:-1], -1), scale.reshape(*weight.shape[:-1], -1), largest


def _quantize(blocks: Tensor, global_scale: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Write packed codes [M, 8] and scales [M] of blocks [M, 16]; returns the largest magnitude [M] of each."""
    largest = _largest(blocks)
    scale.copy_(_block_scales_of(largest, global_scale))
    divisors = _e4m3_values(blocks.device)[scale.view(torch.uint8).int()] * global_scale
    packed.copy_(pack_e2m1(encode_e2m1(blocks.to(torch.float32) / divisors.unsqueeze(1))))
    return largest


class _Room(threading.local):
    """Memory that each thread works in: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.quotients = torch.empty(_PART, dtype=torch.float32)
        self.one, self.other = torch.empty(_PART, dtype=torch.int16), torch.empty(_PART, dtype=torch.int16)


_room = _Room()


def _quantize_halves(blocks: Tensor, global_scale: Tensor, packed: Tensor, scale: Tensor) -> Tensor | None:
    """As ``_quantize``, for up to ``_PART`` values of 16 bits on the CPU, in a third of the time.

    Returns:
        None if nothing was done: ``_quantize`` is left values that are not finite, or far beyond their scale or below.
    """
    values, count = blocks.contiguous().view(-1), blocks.numel()
    by_amax, divisors = _scales_by_amax(blocks.dtype, float(global_scale))
    one, other = _room.one[:count], _room.other[:count]
    # Without their sign, bits are in the order of magnitudes.
    torch.bitwise_and(values.view(torch.int16), 0x7FFF, out=one)
    # The largest of each block, at its first place: of two halves, of these halves, and so on, all blocks at a time.
    left, right = one.numpy(), other.numpy()
    np.maximum(left[:-8], left[8:], out=right[:-8])
    np.maximum(right[:-12], right[4:-8], out=left[:-12])
    np.maximum(left[:-14], left[2:-12], out=right[:-14])
    largest = np.maximum(right[::BLOCK_SIZE], right[1::BLOCK_SIZE])
    amax = torch.from_numpy(largest.astype(np.int32))
    found = by_amax.index_select(0, amax)
    if not len(found) or int(found.max()) >= _UNSURE:
        return None
    scale.view(torch.uint8).copy_(found)
    quotients = _room.quotients[:count].copy_(values)
    quotients.view(blocks.shape).div_(divisors.index_select(0, amax).unsqueeze(1))
    quotients.add_(0.0)  # a zero has no sign
    codes = other
    codes.view(torch.float16).copy_(quotients)
    codes.add_(_TIE)  # half of the last place of E2M1: all but ties are rounded by that
    torch.bitwise_left_shift(codes, 16 - _E2M1_SHIFT, out=one)
    ties = torch.from_numpy(np.flatnonzero(left == 0))  # maybe of float16 alone
    codes.bitwise_right_shift_(_E2M1_SHIFT)
    torch.bitwise_right_shift(codes, 3, out=one)  # the sign is spread over bits 6 and up; now also bit 3
    codes.bitwise_or_(one).bitwise_and_(0xF)
    if len(ties):
        exact = encode_e2m1(quotients.index_select(0, ties).div_(_HALF))
        codes.index_copy_(0, ties, exact.to(torch.int16))
    pairs, room = codes.view(torch.int32), one.view(torch.int32)
    torch.bitwise_right_shift(pairs, 12, out=room).bitwise_or_(pairs)
    packed.view(-1).copy_(room)
    return torch.from_numpy(largest).view(blocks.dtype)


@lru_cache(maxsize=16)
def _scales_by_amax(dtype: torch.dtype, global_scale: float) -> tuple[Tensor, Tensor]:
    """By the bits of the largest magnitude of a block, the byte of its scale, int16, and its divisor over ``_HALF``.

    The byte has ``_UNSURE`` where a quotient could be beyond the largest code, or so small that its sign is lost.
    """
    amax = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    factor = torch.tensor(global_scale, dtype=torch.float32)
    raw = _block_scales_of(amax, factor).view(torch.uint8)
    divisors = _e4m3_values(amax.device)[raw.int()] * factor
    # The least value of 16 bits is 2^-133, of float32 2^-149.
    sure = (amax.to(torch.float32) / divisors < _SURE) & (divisors > 0) & (divisors <= 4.0)
    return raw.to(torch.int16).masked_fill_(~sure, _UNSURE), divisors / _HALF


@lru_cache
def _e4m3_values(device: torch.device) -> Tensor:
    """float32 [256]: the values of all E4M3 codes, as a table; torch decodes codes one by one."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).to(device)


def _largest(blocks: Tensor) -> Tensor:
    """Largest magnitude [M] of each block [M, 16]."""
    if blocks.dtype in _SIXTEEN_BITS:  # bits without their sign are in the order of magnitudes
        return (blocks.contiguous().view(torch.int16) & 0x7FFF).amax(dim=-1).view(blocks.dtype)
    return blocks.abs().amax(dim=-1)


def _block_scales_of(amax: Tensor, global_scale: Tensor) -> Tensor:
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
