"""FP8 activations, by the rule of SGLang.

SGLang 0.5.23, ``apply_fp8_linear`` in ``fp8_utils.py``: codes are ``e4m3(clamp(x * (1 / scale)))`` in float32. The
scale is calibrated, one for the tensor; or ``amax / 448`` of each row.
"""

import torch
from torch import Tensor

from modelopt_convert.fidelity.activations import Quantized, Quantizer
from modelopt_convert.formats.dtypes import E4M3_MAX

_LEAST_AMAX = 1e-10


class _Fp8Quantizer:
    kernels: str | None = None

    def static(self, values: Tensor, input_scale: Tensor) -> Quantized:
        scaled = (values.to(torch.float32) * input_scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX)
        operand = scaled.to(torch.float8_e4m3fn).to(torch.bfloat16)
        return Quantized(operand, input_scale, self.limit(input_scale))

    def own_scale(self, values: Tensor) -> Tensor:
        return values.abs().amax(dim=-1, keepdim=True).to(torch.float32).clamp(min=_LEAST_AMAX) / E4M3_MAX

    def limit(self, input_scale: Tensor) -> Tensor:
        return input_scale * E4M3_MAX


ENTRY: Quantizer = _Fp8Quantizer()
