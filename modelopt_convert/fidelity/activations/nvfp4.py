"""NVFP4 activations, by the rule of flashinfer's ``fp4_quantize`` and the scales of SGLang.

flashinfer 0.7.2, ``quantization_utils.cuh``: with g = 1 / input_scale and a block's largest magnitude b, the block's
scale is ``sf = e4m3_satfinite(g * (b * (1 / 6)))``, and codes are ``e2m1(x * (1 / (sf * (1 / g))))`` in float32. The
kernel takes reciprocals by an approximate instruction, where this takes rounded ones: on ties a code may differ.
SGLang 0.5.23, ``modelopt_quant.py``: without a calibrated scale, ``input_scale = max(amax, 1e-8) / 2688``.
"""

import torch
from torch import Tensor

from modelopt_convert.fidelity.activations import Quantized, Quantizer
from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

E2M1_MAX = 6.0
_LARGEST = E2M1_MAX * E4M3_MAX
_LEAST_AMAX = 1e-8


def round_to_e2m1(values: Tensor) -> Tensor:
    """Round to E2M1: nearest, ties to even, saturating at 6; NaN becomes 0.

    Steps are 0.5 below 2, 1 below 4, and 2 above; an even multiple of the step is an even code.

    Args:
        values: float32, any shape.

    Returns:
        float32 of the same shape.
    """
    size = values.abs().nan_to_num(nan=0.0).clamp(max=E2M1_MAX)
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, values)


def quantize_blocks(values: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes' values and block scales.

    Args:
        values: [M, K], any float dtype; K a multiple of 16.
        input_scale: float32 [].

    Returns:
        E2M1 values float32 [M, K/16, 16], and scales float32 [M, K/16, 1] that are values of E4M3.
    """
    blocks = values.to(torch.float32).view(len(values), -1, BLOCK_SIZE)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    global_scale = input_scale.reciprocal()
    scale = (global_scale * (largest * (1.0 / E2M1_MAX))).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).to(torch.float32)
    # Of a scale that underflows to 0 the reciprocal is infinite: codes are 6, or 0 for zeros, and values are 0.
    factor = torch.where(largest == 0, 0.0, (scale * global_scale.reciprocal()).reciprocal())
    return round_to_e2m1(blocks * factor), scale


class _Nvfp4Quantizer:
    kernels: str | None = "modelopt_convert.fidelity.triton_kernels"

    def static(self, values: Tensor, input_scale: Tensor) -> Quantized:
        codes, scale = quantize_blocks(values, input_scale)
        return Quantized((codes * scale).flatten(-2).to(torch.bfloat16), input_scale, self.limit(input_scale))

    def own_scale(self, values: Tensor) -> Tensor:
        return values.abs().amax().to(torch.float32).clamp(min=_LEAST_AMAX) / _LARGEST

    def limit(self, input_scale: Tensor) -> Tensor:
        return input_scale * _LARGEST


ENTRY: Quantizer = _Nvfp4Quantizer()
