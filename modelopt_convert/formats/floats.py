"""The values of small floats, and rounding to BF16, by numpy: for recipes, which do without torch.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E8M0).
"""

from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Small = Literal["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"]
Narrow = Literal["F8_E4M3", "F8_E5M2", "BF16", "F16"]


@cache
def values_of(dtype: Small) -> "NDArray[np.float32]":
    """Values of all codes of a small float.

    Args:
        dtype: The float: E4M3, E5M2, E8M0, or E2M1 as F4.

    Returns:
        float32 [256]; of E2M1 [16].
    """
    import numpy as np

    if dtype == "F4":
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        return np.concatenate((magnitudes, -magnitudes))
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        return np.append(np.ldexp(1.0, codes[:255] - 127), np.nan).astype(np.float32)
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = codes >> mantissa_bits & (1 << exponent_bits) - 1, codes & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    if dtype == "F8_E4M3":
        values[codes & 0x7F == 0x7F] = np.nan
    else:
        values[exponent == 31] = np.nan
        values[codes & 0x7F == 0x7C] = np.inf
    return np.where(codes >> 7, -values, values).astype(np.float32)


def bf16_of(values: "NDArray[np.float32]") -> "NDArray[np.uint16]":
    """Bits of the nearest BF16, ties to even, as torch rounds; NaN becomes the quiet one.

    Args:
        values: float32 of any shape.

    Returns:
        uint16 of the same shape.
    """
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (bits >> 16 & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    missing = np.isnan(values)
    if missing.any():
        rounded[missing] = 0x7FC0
    return rounded


def widened_values(
    raw: "NDArray[np.uint8]", dtype: Literal["F8_E4M3", "F8_E5M2", "BF16", "F16"]
) -> "NDArray[np.float32]":
    """Values of floats, exactly.

    Args:
        raw: Their bytes [M * size].
        dtype: What they are.

    Returns:
        float32 [M].
    """
    import numpy as np

    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return values_of(dtype)[raw]
