"""Operands decoded to BF16, without loss, and multiplied by the GPU's BF16 tensor cores.

What is left to differ is the order of accumulation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import epilogue
from modelopt_convert.verification.gemm.operands import Activations, Weight


@dataclass(frozen=True, slots=True)
class _Prepared:
    values: Tensor  # BF16 [N, K]
    bias: Tensor | None


class Bf16:
    """Runs on every CUDA GPU; ``gemm`` works on the CPU too, in float32, for tests."""

    name = "bf16"
    kind: Kind = "emulated"
    formats: frozenset[Algorithm] = frozenset(FORMATS)

    def unavailable(self, device: torch.device) -> str | None:
        """Needs CUDA: on a CPU the reference does the same, better."""
        return None if device.type == "cuda" else "needs a CUDA GPU"

    def prepare(self, weight: Weight, *, poison: bool) -> _Prepared:
        """Decode; there is no padding to poison."""
        del poison
        return _Prepared(weight.in_bf16(), weight.bias)

    def gemm(self, prepared: _Prepared, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Float32 accumulators; alpha and bias in float64; one rounding."""
        rows, columns = activations.in_bf16(), prepared.values.T
        if rows.is_cuda:
            accumulators = torch.mm(rows, columns, out_dtype=torch.float32)
        else:  # no such mm there
            accumulators = rows.to(torch.float32) @ columns.to(torch.float32)
        return epilogue(accumulators, alpha, prepared.bias, out)
