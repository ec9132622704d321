"""The safetensors dtypes: their sizes, and the order in which the reference writer lays tensors out."""

import math
from collections.abc import Sequence

# Bits per element, in the order of the reference's ``Dtype`` enum (safetensors/src/tensor.rs). The order matters:
# the reference writer sorts by it, descending, so that the widest alignment comes first.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

DTYPE_RANK: dict[str, int] = {name: rank for rank, name in enumerate(DTYPE_BITS)}

HALF_AND_FLOAT = frozenset({"BF16", "F16", "F32"})
"""The dtypes in which a diffusion transformer's unquantized tensors come."""

E4M3_MAX = 448.0
"""The largest value of ``F8_E4M3``."""


def num_bits(dtype: str, shape: Sequence[int]) -> int:
    """Number of bits a tensor of ``dtype`` and ``shape`` takes; Python integers cannot overflow."""
    return math.prod(shape) * DTYPE_BITS[dtype]


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Number of bytes a tensor of ``dtype`` and ``shape`` takes.

    Raises:
        ValueError: The bits do not fill whole bytes (sub-byte dtypes only).
    """
    bits = num_bits(dtype, shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} takes {bits} bits, which is not a whole number of bytes")
    return bits // 8
