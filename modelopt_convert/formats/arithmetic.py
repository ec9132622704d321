"""Values of quantized weights by tables: each pair of scale and code is computed once, then looked up.

The arithmetic is that of ModelOpt, torchao and comfy-kitchen: ``code * (scale * global scale)``, each product rounded
to float32; see ``dequantize_nvfp4`` and ``dequantize_fp8``.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import decode_e2m1, quantize_nvfp4, shared_global_scale, unpack_e2m1
from modelopt_convert.formats.tensor_bytes import from_bytes, to_bytes

Plain = Literal["BF16", "F32"]
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_E8M0_BIAS = 127


def _e4m3() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def _words(values: torch.Tensor, dtype: Plain, width: int) -> NDArray[Any]:
    """Values cast, and each row of them as one word of ``width`` bytes."""
    cast = values.to(torch.bfloat16 if dtype == "BF16" else torch.float32).contiguous()
    return np.frombuffer(bytes(to_bytes(cast)), _WORDS[width])


@lru_cache(maxsize=64)
def nvfp4_table(global_scale: float, dtype: Plain) -> NDArray[Any]:
    """The two values of a byte of codes, by ``block scale << 8 | codes``: one word for both, the low nibble's first.

    Args:
        global_scale: A float32.
        dtype: Of the values.
    """
    factors = _e4m3() * torch.tensor(global_scale, dtype=torch.float32)
    pairs = decode_e2m1(unpack_e2m1(torch.arange(256, dtype=torch.int32).to(torch.uint8).view(-1, 1)))  # [256, 2]
    return _words(pairs * factors.view(-1, 1, 1), dtype, 4 if dtype == "BF16" else 8)


@lru_cache(maxsize=64)
def fp8_table(scale: float, dtype: Plain) -> NDArray[Any]:
    """The value of each E4M3 code.

    Args:
        scale: A float32.
        dtype: Of the values.
    """
    return _words(_e4m3() * torch.tensor(scale, dtype=torch.float32), dtype, 2 if dtype == "BF16" else 4)


@lru_cache(maxsize=2)
def mxfp8_table(dtype: Plain) -> NDArray[Any]:
    """The value of a code, by ``E8M0 scale << 8 | code``."""
    exponents = torch.arange(256, dtype=torch.float64) - _E8M0_BIAS
    factors = torch.exp2(exponents)
    factors[255] = torch.nan
    values = (_e4m3().to(torch.float64) * factors.view(-1, 1)).to(torch.float32)
    return _words(values, dtype, 2 if dtype == "BF16" else 4)


def rebased_bytes(factor: float, largest: float) -> bytes:
    """What becomes of each E4M3 byte where its factor is replaced by a larger one, rounded to E4M3 again.

    The arithmetic is that of SGLang 0.5.23 (``_rebase_partition_weight_scales`` in ``modelopt_quant.py``).

    Args:
        factor: A float32, positive.
        largest: A float32, at least as large.
    """
    if factor == largest:
        return bytes(range(256))
    rebased = (_e4m3() * (factor / largest)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return bytes(to_bytes(rebased))


def quantized_blocks(raw: memoryview, dtype: str, global_scale: float) -> tuple[memoryview, memoryview]:
    """Codes and scales of whole blocks of 16 values, as ``quantize_nvfp4`` makes them of the weight.

    Args:
        raw: The values.
        dtype: Of the values.
        global_scale: A float32.
    """
    values = from_bytes(raw, dtype, (1, -1))
    codes, scales = quantize_nvfp4(values, torch.tensor(global_scale, dtype=torch.float32))
    return to_bytes(codes), to_bytes(scales)


def quantized_values(raw: memoryview, dtype: str, scale: float) -> memoryview:
    """E4M3 codes of values, as ``quantize_fp8`` makes them of the weight."""
    return to_bytes(quantize_fp8(from_bytes(raw, dtype, (-1,)), torch.tensor(scale, dtype=torch.float32)))


def nvfp4_scale_of(amax: float) -> float:
    """Global scale of weights by their largest magnitude: a float32."""
    return float(shared_global_scale([torch.tensor([amax], dtype=torch.float32)]))


def fp8_scale_of(amax: float) -> float:
    """FP8 scale of weights by their largest magnitude, as ModelOpt's max calibration: ``amax / 448`` in float32."""
    return float(torch.tensor(amax, dtype=torch.float32) / E4M3_MAX)


def squared_error(wanted: bytes, found: bytes) -> tuple[float, float]:
    """Sums over float32 values: of the squared differences, and of the squares of what is wanted."""
    left, right = np.frombuffer(wanted, np.float32), np.frombuffer(found, np.float32)
    difference = left.astype(np.float64) - right
    return float(difference @ difference), float(left.astype(np.float64) @ left.astype(np.float64))
