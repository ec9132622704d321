"""FP8 operands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.formats.layout import Layout
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.proof.tensors import load, load_rows, load_weight
from modelopt_convert.verification.gemm.operands import OperandFormat, Weight, one_row_zero


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """An FP8 weight.

    Attributes:
        codes: float8_e4m3fn [N, K].
        tensor_scale: ``weight_scale``.
        bias: [N] or None.
    """

    algorithm: ClassVar[Algorithm] = FORMAT.algorithm
    codes: Tensor
    tensor_scale: float
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, begin: int, end: int) -> Tensor:
        """float64 [end - begin, K]: rows of codes, without the scale of the tensor."""
        return self.codes[begin:end].to(torch.float64)

    def in_bf16(self) -> Tensor:
        """See ``Weight``."""
        return self.codes.to(torch.bfloat16)

    def to(self, device: torch.device) -> "Fp8Weight":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Fp8Weight(self.codes.to(device), self.tensor_scale, bias)

    def one_hot(self, begin: int, end: int, device: torch.device) -> "Fp8Activations":
        """See ``Weight``."""
        rows = torch.arange(end - begin, device=device)
        codes = torch.zeros(end - begin, self.shape[1], dtype=torch.float32, device=device)
        codes[rows, rows + begin] = 1.0
        return Fp8Activations(codes.to(torch.float8_e4m3fn), 1.0)

    def activations(self, values: Tensor) -> "Fp8Activations":
        """See ``Weight``."""
        scale = values.abs().amax() / E4M3_MAX
        return Fp8Activations(quantize_fp8(values, scale), float(scale))

    def mutants(self) -> dict[str, Weight]:
        """See ``Weight``."""
        raw = self.codes.view(torch.uint8)
        swapped = raw.view(raw.shape[0], -1, 2).flip(-1).reshape(raw.shape)
        return {
            "signs flipped": replace(self, codes=(raw ^ 0x80).view(torch.float8_e4m3fn)),
            "columns swapped": replace(self, codes=swapped.view(torch.float8_e4m3fn)),
            "one row zero": replace(self, codes=one_row_zero(raw).view(torch.float8_e4m3fn)),
        }

    def without_bias(self) -> "Fp8Weight":
        """The same without its bias."""
        return replace(self, bias=None)

    def columns(self, begin: int, end: int) -> "Fp8Weight":
        """See ``Weight``."""
        return replace(self, codes=self.codes[:, begin:end])


@dataclass(frozen=True, slots=True)
class Fp8Activations:
    """FP8 activations.

    Attributes:
        codes: float8_e4m3fn [M, K].
        tensor_scale: ``input_scale``.
    """

    codes: Tensor
    tensor_scale: float

    def decode(self) -> Tensor:
        """float64 [M, K], without the scale of the tensor."""
        return self.codes.to(torch.float64)

    def in_bf16(self) -> Tensor:
        """See ``Weight``."""
        return self.codes.to(torch.bfloat16)

    def part(self, begin: int, end: int) -> "Fp8Activations":
        """Rows ``begin`` to ``end``."""
        return Fp8Activations(self.codes[begin:end], self.tensor_scale)

    def to(self, device: torch.device) -> "Fp8Activations":
        """The same on a device."""
        return Fp8Activations(self.codes.to(device), self.tensor_scale)


class _Fp8Operands:
    def read(
        self, reader: CheckpointReader, module: PackedModule, layout: Layout, rows: Sequence[int] | None
    ) -> Fp8Weight:
        bias = load(reader, module.bias.name) if module.bias is not None and rows is None else None
        scale = tensor_scale(reader, module, "weight_scale")
        name = module.weight.name
        codes = load_weight(reader, name) if rows is None else load_rows(reader, name, rows)
        return Fp8Weight(codes, scale, bias)

    def quantized(self, values: Tensor, bias: Tensor | None, scale: float | None = None) -> Fp8Weight:
        factor = values.abs().amax().to(torch.float32) / E4M3_MAX if scale is None else torch.tensor(scale)
        return Fp8Weight(quantize_fp8(values, factor), float(factor), bias)


ENTRY: OperandFormat = _Fp8Operands()
