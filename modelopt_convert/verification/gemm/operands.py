"""Operands of a GEMM as a checkpoint stores them, in the canonical layout, and the activations that are packed here.

M is the number of rows of activations, N of output features, K of input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import (
    BLOCK_SIZE,
    decode_e2m1,
    pack_e2m1,
    quantize_nvfp4,
    shared_global_scale,
    unpack_e2m1,
)

_ONE_E2M1 = 2  # the code of 1.0


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """An NVFP4 weight.

    Attributes:
        packed: uint8 [N, K/2], the even column in the low nibble.
        scale: float8_e4m3fn [N, K/16], row-major.
        tensor_scale: ``weight_scale_2``.
        bias: [N] or None.
    """

    packed: Tensor
    scale: Tensor
    tensor_scale: float
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    def decode(self, begin: int, end: int) -> Tensor:
        """float64 [end - begin, K]: rows of codes times block scales, without the scale of the tensor."""
        values = decode_e2m1(unpack_e2m1(self.packed[begin:end])).to(torch.float64)
        return values * self.scale[begin:end].to(torch.float64).repeat_interleave(BLOCK_SIZE, dim=-1)

    def to(self, device: torch.device) -> "Nvfp4Weight":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Nvfp4Weight(self.packed.to(device), self.scale.to(device), self.tensor_scale, bias)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """An FP8 weight.

    Attributes:
        codes: float8_e4m3fn [N, K].
        tensor_scale: ``weight_scale``.
        bias: [N] or None.
    """

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

    def to(self, device: torch.device) -> "Fp8Weight":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Fp8Weight(self.codes.to(device), self.tensor_scale, bias)


Weight = Nvfp4Weight | Fp8Weight


@dataclass(frozen=True, slots=True)
class Nvfp4Activations:
    """NVFP4 activations.

    Attributes:
        packed: uint8 [M, K/2], the even column in the low nibble: kernel order, whatever the weight's.
        scale: float8_e4m3fn [M, K/16], row-major.
        tensor_scale: ``input_scale``.
    """

    packed: Tensor
    scale: Tensor
    tensor_scale: float

    def decode(self) -> Tensor:
        """float64 [M, K], without the scale of the tensor."""
        values = decode_e2m1(unpack_e2m1(self.packed)).to(torch.float64)
        return values * self.scale.to(torch.float64).repeat_interleave(BLOCK_SIZE, dim=-1)


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


Activations = Nvfp4Activations | Fp8Activations


def one_hot(weight: Weight, begin: int, end: int, device: torch.device) -> Activations:
    """Rows ``begin`` to ``end`` of the K x K identity in the weight's own format, with a tensor scale of 1.

    A GEMM with them returns columns of the decoded weight, bit for bit: E2M1 times E4M3 fits BF16.
    """
    num_columns = weight.shape[1]
    rows = torch.arange(end - begin, device=device)
    if isinstance(weight, Fp8Weight):
        codes = torch.zeros(end - begin, num_columns, dtype=torch.float32, device=device)
        codes[rows, rows + begin] = 1.0
        return Fp8Activations(codes.to(torch.float8_e4m3fn), 1.0)
    codes = torch.zeros(end - begin, num_columns, dtype=torch.uint8, device=device)
    codes[rows, rows + begin] = _ONE_E2M1
    scale = torch.ones(end - begin, num_columns // BLOCK_SIZE, device=device).to(torch.float8_e4m3fn)
    return Nvfp4Activations(pack_e2m1(codes), scale, 1.0)


def random_activations(weight: Weight, num_rows: int, device: torch.device) -> Activations:
    """Seeded activations with channels of different size, quantized here and not by any backend.

    Drawn on the CPU, so that they are the same on every machine.
    """
    generator = torch.Generator().manual_seed(5)
    num_columns = weight.shape[1]
    values = torch.randn(num_rows, num_columns, generator=generator)
    values *= torch.rand(num_columns, generator=generator).pow(2) * 3 + 0.2
    if isinstance(weight, Fp8Weight):
        scale = values.abs().amax() / 448.0
        return Fp8Activations(quantize_fp8(values, scale).to(device), float(scale))
    tensor_scale = shared_global_scale([values])
    packed, block_scale = quantize_nvfp4(values, tensor_scale)
    return Nvfp4Activations(packed.to(device), block_scale.to(device), float(tensor_scale))
