"""Scales brought to another factor, and weights quantized again, in pieces; and what that changes."""

import numpy as np
import torch

from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
from modelopt_convert.formats.tensor_bytes import from_bytes, to_bytes


def _e4m3() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


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
    """FP8 scale of weights by their largest magnitude, as ModelOpt's max calibration: ``amax / 448`` in float32.

    Weights of zeros have the scale 1, and an amax is no subnormal, as ``TensorQuantizer.export_amax`` of ModelOpt 0.47
    has them. ModelOpt's export of weights goes without it, and writes codes that are NaN for zeros.
    """
    largest = max(amax, torch.finfo(torch.float32).tiny) if amax else E4M3_MAX
    return float(torch.tensor(largest, dtype=torch.float32) / E4M3_MAX)


def squared_error(wanted: bytes, found: bytes) -> tuple[float, float]:
    """Sums over float32 values: of the squared differences, and of the squares of what is wanted."""
    left, right = np.frombuffer(wanted, np.float32), np.frombuffer(found, np.float32)
    difference = left.astype(np.float64) - right
    return float(difference @ difference), float(left.astype(np.float64) @ left.astype(np.float64))
