"""The bytes of safetensors tensors as torch tensors: views, casts of chunks, and comparison up to a cast."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from modelopt_convert.formats.format import Weights
from modelopt_convert.formats.fp8.codes import Clipped, bf16_codes, clipped, dequantize_fp8, quantize_fp8
from modelopt_convert.formats.nvfp4.gptq import Compensation
from modelopt_convert.formats.nvfp4.sweep import quantize

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}

_COMPARE: Callable[[int, int, int], int] = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(("memcmp", ctypes.CDLL(None)))  # by which Python gives up its lock once, and torch each time it makes a tensor
_NOT_FINITE = "expected finite weights, found NaN or infinity"


def from_bytes(raw: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """A tensor from the bytes of a safetensors tensor. A writable buffer is not copied: the tensor uses its memory."""
    view = memoryview(raw)
    torch_dtype = TORCH_DTYPES[dtype]  # frombuffer refuses an empty buffer
    if not view.nbytes:
        return torch.empty(0, dtype=torch_dtype).reshape(tuple(shape))
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch_dtype).reshape(tuple(shape))


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def first_place(mask: Tensor) -> str:
    """Where the first true element lies, in words."""
    return f"first at {mask.nonzero()[0].tolist()}"


def equal_bytes(left: memoryview, right: memoryview) -> bool:
    """Whether two writable buffers of one size are equal. memoryviews would compare bytewise, under Python's lock."""
    if not len(left):
        return True
    one, other = (ctypes.addressof(ctypes.c_char.from_buffer(side)) for side in (left, right))
    return _COMPARE(one, other, len(left)) == 0


def cast_chunk(raw: bytes | memoryview, source: str, target: str) -> memoryview:
    """Cast consecutive whole elements from one safetensors dtype to another, rounding to nearest even."""
    return to_bytes(from_bytes(raw, source, (-1,)).to(TORCH_DTYPES[target]))


def cast_paths(source: str, target: str) -> list[tuple[str, ...]]:
    """The ways in which a ``source`` value may have become a ``target`` one: directly, or by way of 16 bits."""
    middle = [dtype for dtype in ("BF16", "F16") if dtype not in (source, target)]
    return [(target,), *((dtype, target) for dtype in middle)]


def equal_after(base: Tensor, path: Sequence[str], export: Tensor) -> bool:
    """Whether ``base``, cast along ``path``, has the very bits of ``export``."""
    for dtype in path:
        base = base.to(TORCH_DTYPES[dtype])
    return torch.equal(base.contiguous().view(torch.uint8), export.contiguous().view(torch.uint8))


def quantize_chunk(
    raw: bytes | memoryview, source: str, scale: float, quotient: str | None = None
) -> tuple[memoryview, Clipped]:
    """E4M3 codes of consecutive elements under the scale of the whole weight, and how much was clipped.

    Args:
        raw: Elements of ``source``.
        source: safetensors dtype name.
        scale: The weight's scale.
        quotient: Round to BF16 first, as ModelOpt's recipe loads a weight, and divide in this dtype; None to divide in
            ``source``.

    Raises:
        ValueError: The weight holds NaN or infinity, or rounds to infinity.
    """
    weight, divisor = from_bytes(raw, source, (-1,)), torch.tensor(scale, dtype=torch.float32)
    weight = weight if quotient is None else weight.to(torch.bfloat16)
    if weight.dtype != torch.bfloat16:
        if not bool(weight.isfinite().all()):
            raise ValueError(_NOT_FINITE)
        return to_bytes(quantize_fp8(weight, divisor)), clipped(weight, divisor)
    bits = weight.view(torch.int16)
    largest = (bits & 0x7FFF).amax().view(torch.bfloat16)  # bits without their sign are in the order of magnitudes
    if not bool(largest.isfinite()):
        raise ValueError(_NOT_FINITE)
    # BF16 has 65,536 values: the code of each is computed once, and then looked up.
    codes = bf16_codes(scale, TORCH_DTYPES[quotient or "BF16"]).index_select(
        0, bits.to(torch.int32).bitwise_and_(0xFFFF)
    )
    beyond = clipped(largest, divisor)  # nearly always nothing is beyond: count only where something is
    return to_bytes(codes), clipped(weight, divisor) if beyond.count else beyond


def largest_bits(weight: Tensor) -> Tensor:
    """int16 []: the bits of the largest magnitude in a weight that was rounded to BF16; NaN is above infinity."""
    return (weight.to(torch.bfloat16).view(torch.int16) & 0x7FFF).amax()  # without the sign: in the order of magnitudes


def magnitude(bits: Tensor) -> float:
    """The value of ``largest_bits``.

    Raises:
        ValueError: The value is NaN or infinity.
    """
    largest = float(bits.view(torch.bfloat16))
    if not largest < float("inf"):
        raise ValueError(_NOT_FINITE)
    return largest


def largest_of_chunk(raw: bytes | memoryview, source: str) -> float:
    """Largest magnitude among consecutive elements of a weight after rounding to BF16, the dtype that is quantized.

    Raises:
        ValueError: An element is NaN or infinity, or rounds to infinity.
    """
    if source != "BF16":
        return magnitude(largest_bits(from_bytes(raw, source, (-1,))))
    # As signed numbers, bits are in the order of magnitudes without a sign, as unsigned ones in that with one: two
    # largest values tell, without an array.
    bits = np.frombuffer(raw, np.uint16)
    largest = max(int(bits.view(np.int16).max()), int(bits.max()) & 0x7FFF)
    return magnitude(torch.tensor(largest, dtype=torch.int16))


def quantize_nvfp4_rows(
    raw: bytes | memoryview,
    source: str,
    columns: int,
    scale: float,
    weights: Weights = "max",
    importance: bytes = b"",
    compensation: Compensation | None = None,
) -> tuple[memoryview, memoryview]:
    """Packed codes and block scales of whole rows, rounded to BF16 first, as ModelOpt's recipe loads a weight.

    Args:
        raw: Rows [R, K] of ``source``.
        source: safetensors dtype name.
        columns: K, a multiple of 16.
        scale: The global scale.
        weights: How block scales are chosen.
        importance: For ``sweep-weighted`` and ``gptq``: how much an error in each column weighs, float32 [K].
        compensation: For ``gptq``.

    Returns:
        uint8 [R, K/2], low nibble first, and float8_e4m3fn [R, K/16], row-major.
    """
    rows = from_bytes(raw, source, (-1, columns)).to(torch.bfloat16)
    counts = from_bytes(importance, "F32", (columns,)) if importance else None
    packed, scales = quantize(weights, rows, torch.tensor(scale, dtype=torch.float32), counts, compensation)
    return to_bytes(packed), to_bytes(scales)


def dequantize_chunk(raw: bytes | memoryview, scale: float) -> memoryview:
    """BF16 values of consecutive E4M3 codes under the scale of the whole weight."""
    values = dequantize_fp8(from_bytes(raw, "F8_E4M3", (-1,)), torch.tensor(scale, dtype=torch.float32))
    return to_bytes(values.to(torch.bfloat16))
