"""The values of small floats, and rounding to BF16, by numpy: for planning and recipes, which do without torch.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E8M0).
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_HALF = np.uint32(0x7FFF)
_NAN = np.uint16(0x7FC0)


def _small(exponent_bits: int, bias: int) -> Floats:
    """Values of all codes of a float of 8 bits with a sign, float32 [256], before its special ones."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = codes >> mantissa_bits & (1 << exponent_bits) - 1, codes & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    return np.where(codes >> 7, -values, values).astype(np.float32)


def _e4m3() -> Floats:
    values = _small(4, 7)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _e5m2() -> Floats:
    values = _small(5, 15)
    values[[0x7C, 0xFC]] = np.inf, -np.inf
    values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values


def _e8m0() -> Floats:
    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


E4M3 = _e4m3()
"""Values of E4M3 codes, float32 [256]."""
E5M2 = _e5m2()
"""Values of E5M2 codes, float32 [256]."""
E8M0 = _e8m0()
"""Values of E8M0 codes, float32 [256]."""
E2M1: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Values of E2M1 codes, float32 [16]."""
_TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}


def bf16_of(values: Floats) -> NDArray[np.uint16]:
    """Bits of the nearest BF16, ties to even, as torch rounds; NaN becomes the quiet one.

    Args:
        values: float32 of any shape.

    Returns:
        uint16 of the same shape.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (bits >> 16 & 1) + _HALF) >> 16).astype(np.uint16)
    missing = np.isnan(values)
    if missing.any():
        rounded[missing] = _NAN
    return rounded


def widened_values(raw: Bytes, dtype: str) -> Floats:
    """Values of floats, exactly.

    Args:
        raw: Their bytes [M * size].
        dtype: F8_E4M3, F8_E5M2, BF16 or F16.

    Returns:
        float32 [M].
    """
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return _TABLES[dtype][raw]
