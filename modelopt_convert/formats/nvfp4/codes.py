"""NVFP4: E2M1 codes, two to a byte, under an E4M3 scale per 16 columns and a float32 scale per tensor.

The arithmetic is ModelOpt's, to the bit (``NVFP4QTensor``, modelopt/torch/quantization/qtensor/nvfp4_tensor.py, 0.47).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
_CACHED = 1 << 17  # so many elements in float32 stay in a core's cache


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
    codes = torch.empty(bits.shape, dtype=torch.uint8, device=values.device)
    _encode(bits, torch.empty_like(bits), torch.empty_like(bits), codes)
    return codes.reshape(values.shape)


def _encode(bits: Tensor, low: Tensor, key: Tensor, codes: Tensor) -> None:
    """Codes of the float32 with these bits; ``low`` and ``key`` are room to work in, and ``key`` may be ``bits``."""
    # The key is the upper 16 bits; its last bit is also set where any lower bit is set. Bounds between neighbours have
    # at most three bits of mantissa. So this bit tells a value just above a bound from the bound itself, and no lower
    # bit tells more.
    torch.bitwise_and(bits, 0xFFFF, out=low).clamp_(max=1)
    torch.bitwise_right_shift(bits, 16, out=key).bitwise_and_(0xFFFF).bitwise_or_(low)
    torch.index_select(_codes_by_key(bits.device), 0, key, out=codes)


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
    if weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"K must be a multiple of {BLOCK_SIZE}, found {list(weight.shape)}")
    rows, columns = weight.reshape(-1, weight.shape[-1]), weight.shape[-1]
    packed = torch.empty(rows.shape[0], columns // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows.shape[0], columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    height = max(1, _CACHED // max(1, columns)) if weight.device.type == "cpu" else rows.shape[0]
    height = max(1, min(height, rows.shape[0]))
    # All parts work in the same memory: fresh memory costs more than the arithmetic. The loop does what quantize_codes
    # does.
    quotients = torch.empty(height, columns, dtype=torch.float32, device=weight.device)
    low = torch.empty(height * columns, dtype=torch.int32, device=weight.device)
    codes = torch.empty(height, columns, dtype=torch.uint8, device=weight.device)
    for top in range(0, rows.shape[0], height):
        part = rows[top : top + height]
        scale[top : top + height] = part_scale = _block_scales_of(part, global_scale)
        divisors = _e4m3_values(weight.device)[part_scale.view(torch.uint8).int()] * global_scale
        values = quotients[: len(part)].copy_(part)
        values.view(*part_scale.shape, BLOCK_SIZE).div_(divisors.unsqueeze(-1))
        bits, found = values.view(torch.int32).reshape(-1), codes[: len(part)]
        _encode(bits, low[: bits.numel()], bits, found.view(-1))
        packed[top : top + height] = pack_e2m1(found)
    return packed.reshape(*weight.shape[:-1], -1), scale.reshape(*weight.shape[:-1], -1)


@lru_cache
def _e4m3_values(device: torch.device) -> Tensor:
    """float32 [256]: the values of all E4M3 codes, as a table; torch decodes codes one by one."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).to(device)


def _block_scales_of(rows: Tensor, global_scale: Tensor) -> Tensor:
    if rows.dtype in (torch.bfloat16, torch.float16):  # bits without their sign are in the order of magnitudes
        bits = (rows.contiguous().view(torch.int16) & 0x7FFF).reshape(len(rows), -1, BLOCK_SIZE).amax(dim=-1)
        amax = bits.view(rows.dtype).to(torch.float32)
    else:
        amax = rows.reshape(len(rows), -1, BLOCK_SIZE).abs().amax(dim=-1)
    scale = amax / (E2M1_MAX * global_scale)
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
