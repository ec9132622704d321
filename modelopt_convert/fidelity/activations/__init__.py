"""Activations as an engine quantizes them before its GEMM, one module a format.

A GEMM of quantized operands is emulated by one of BF16 operands: code times block scale fits BF16, and what is left is
one scale a tensor, or one a row.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from modelopt_convert.formats.format import Algorithm, entry


@dataclass(frozen=True, slots=True)
class Quantized:
    """Activations after quantization.

    Attributes:
        operand: BF16 [M, K], codes times block scales, exact.
        scale: float32 [] or [M, 1]: what the operand is multiplied by.
        limit: float32 [] or [M, 1]: the largest magnitude that the scale can hold.
    """

    operand: Tensor
    scale: Tensor
    limit: Tensor


class Quantizer(Protocol):
    """How a format's activations are made: the entry of a format in this folder.

    Attributes:
        kernels: The module of Triton kernels that run layers of the format; None where plain torch runs all of them.
    """

    kernels: str | None

    def static(self, values: Tensor, input_scale: Tensor) -> Quantized:
        """By a scale.

        Args:
            values: [M, K], any float dtype.
            input_scale: float32 [], or [M, 1].
        """

    def own_scale(self, values: Tensor) -> Tensor:
        """The scale of values [M, K] that have no calibrated one: float32 [], or [M, 1] where each row has its own."""

    def limit(self, input_scale: Tensor) -> Tensor:
        """The largest magnitude that a scale can hold."""


def quantizer_of(algorithm: Algorithm) -> Quantizer:
    """How a format's activations are made."""
    found: Quantizer = entry("modelopt_convert.fidelity.activations", algorithm)
    return found


def dynamic(algorithm: Algorithm, values: Tensor) -> Quantized:
    """Activations by a scale of their own."""
    quantizer = quantizer_of(algorithm)
    return quantizer.static(values, quantizer.own_scale(values))
