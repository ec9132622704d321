"""Between the bytes of a safetensors file and torch: views, casts of chunks, and comparison up to a cast."""

from collections.abc import Sequence

import torch
from torch import Tensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


def from_bytes(raw: bytes, dtype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of its own memory from the bytes of a safetensors tensor."""
    torch_dtype = TORCH_DTYPES[dtype]  # frombuffer refuses an empty buffer
    flat = torch.frombuffer(bytearray(raw), dtype=torch_dtype) if raw else torch.empty(0, dtype=torch_dtype)
    return flat.reshape(tuple(shape))


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def cast_chunk(raw: bytes, source: str, target: str) -> memoryview:
    """Cast consecutive elements from one dtype to another, rounding to nearest even.

    Args:
        raw: Whole elements of ``source``.
        source: safetensors dtype name.
        target: safetensors dtype name.
    """
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
