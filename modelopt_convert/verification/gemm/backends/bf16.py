"""Operands decoded to BF16, without loss, and multiplied by the GPU's BF16 tensor cores.

E2M1 has 2 significant bits and E4M3 4: their product fits BF16. What is left to differ is the order of accumulation.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import epilogue
from modelopt_convert.verification.gemm.fp8 import Fp8Activations, Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Activations, Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Activations, Weight

_BLOCK_BYTES = 8  # codes of a block of 16


@dataclass(frozen=True, slots=True)
class _Prepared:
    values: Tensor  # BF16 [N, K]
    bias: Tensor | None


class Bf16:
    """Runs on every CUDA GPU; ``gemm`` works on the CPU too, in float32, for tests."""

    name = "bf16"
    kind: Kind = "emulated"
    formats: frozenset[Algorithm] = frozenset({"nvfp4", "fp8"})

    def unavailable(self, device: torch.device) -> str | None:
        """Needs CUDA: on a CPU the reference does the same, better."""
        return None if device.type == "cuda" else "needs a CUDA GPU"

    def prepare(self, weight: Weight, *, poison: bool) -> _Prepared:
        """Decode; there is no padding to poison."""
        del poison
        return _Prepared(_values(weight), weight.bias)

    def gemm(self, prepared: _Prepared, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Float32 accumulators; alpha and bias in float64; one rounding."""
        rows, columns = _values(activations), prepared.values.T
        if rows.is_cuda:
            accumulators = torch.mm(rows, columns, out_dtype=torch.float32)
        else:  # no such mm there
            accumulators = rows.to(torch.float32) @ columns.to(torch.float32)
        return epilogue(accumulators, alpha, prepared.bias, out)


def _values(operand: Weight | Activations) -> Tensor:
    if isinstance(operand, Fp8Weight | Fp8Activations):
        return operand.codes.to(torch.bfloat16)
    assert isinstance(operand, Nvfp4Weight | Nvfp4Activations)  # the other of its formats
    return decode_nvfp4(operand.packed, operand.scale)


def decode_nvfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Codes times block scales, by a table of all bytes: another way than the referee's.

    Args:
        packed: uint8 [N, K/2], low nibble first.
        scale: float8_e4m3fn [N, K/16], row-major.

    Returns:
        BF16 [N, K], exact.
    """
    pairs = _pairs(packed.device)[packed.to(torch.int32)]
    blocks = pairs.view(packed.shape[0], -1, 2 * _BLOCK_BYTES)
    return (blocks * scale.to(torch.bfloat16)[..., None]).view(packed.shape[0], -1)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """BF16 [256, 2]: the low and the high nibble of every byte, from the bits of E2M1."""
    code = torch.arange(16)
    sign, exponent, mantissa = 1 - 2 * (code >> 3), (code >> 1) & 3, (code & 1) / 2
    value = sign * torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
    byte = torch.arange(256)
    return torch.stack((value[byte & 15], value[byte >> 4]), dim=1).to(device, torch.bfloat16)
