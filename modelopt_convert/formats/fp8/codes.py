"""FP8: E4M3 codes under one float32 scale per tensor.

The arithmetic is ModelOpt's, to the bit (``to_quantized_weight``, modelopt/torch/export/quant_utils.py, 0.47): the
quotient is rounded to the weight's dtype first, since torch divides a BF16 tensor by a 0-dim float32 in BF16.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from modelopt_convert.formats.dtypes import E4M3_MAX

# A weight's amax divided by its scale need not be 448 exactly. A value beyond this is one the scale was not made for.
_CLIPPED = E4M3_MAX * (1 + 1e-6)


@dataclass(frozen=True, slots=True)
class Clipped:
    """Values that a scale is too small for.

    Attributes:
        count: How many values are beyond 448 times the scale.
        largest: The largest ``|weight / scale|`` of these values.
    """

    count: int
    largest: float

    def plus(self, other: "Clipped") -> "Clipped":
        """The values of both together."""
        return Clipped(self.count + other.count, max(self.largest, other.largest))


def quantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes of a weight under a given scale: ``e4m3(clamp(weight / scale))``, the quotient in the weight's dtype.

    The clamp is explicit, since libraries differ in what a cast does beyond 448: some saturate, others give NaN.

    Args:
        weight: Any shape, in BF16, F16 or F32.
        scale: float32 [], or of the weight's dtype where ``mtq.compress`` made it.

    Returns:
        float8_e4m3fn of the same shape.
    """
    return (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@lru_cache(maxsize=8)
def bf16_codes(scale: float, quotient: torch.dtype) -> Tensor:
    """Codes that ``quantize_fp8`` gives for every BF16 value, by the value's bits.

    Args:
        scale: The weight's scale.
        quotient: The dtype that values are brought to before they are divided, and that the quotient is rounded to.

    Returns:
        float8_e4m3fn codes as uint8 [65536].
    """
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return quantize_fp8(values.to(quotient), torch.tensor(scale, dtype=torch.float32)).view(torch.uint8)


def clipped(weight: Tensor, scale: Tensor) -> Clipped:
    """The values of a weight that ``quantize_fp8`` cuts off.

    Args:
        weight: Any shape and float dtype.
        scale: float32 [].
    """
    if weight.numel() == 0:
        return Clipped(0, 0.0)
    quotient = weight.to(torch.float32).abs() / scale.to(torch.float32)
    return Clipped(int((quotient > _CLIPPED).sum()), float(quotient.amax()))


def dequantize_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of codes: ``code * scale``.

    Args:
        codes: float8_e4m3fn, any shape.
        scale: float32 [].

    Returns:
        float32 of the same shape.
    """
    return codes.to(torch.float32) * scale.to(torch.float32)
