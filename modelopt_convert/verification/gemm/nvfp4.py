"""NVFP4 operands."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.nvfp4.codes import (
    decode_e2m1,
    pack_e2m1,
    quantize_nvfp4,
    shared_global_scale,
    swap_nibbles,
    unpack_e2m1,
)
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.scales import scale_readings, swizzle_128x4
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.proof.tensors import load, load_weight
from modelopt_convert.verification.gemm.operands import OperandFormat, Weight, one_row_zero

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

    algorithm: ClassVar[Algorithm] = FORMAT.algorithm
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

    def in_bf16(self) -> Tensor:
        """See ``Weight``."""
        return decode_nvfp4(self.packed, self.scale)

    def to(self, device: torch.device) -> "Nvfp4Weight":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Nvfp4Weight(self.packed.to(device), self.scale.to(device), self.tensor_scale, bias)

    def one_hot(self, begin: int, end: int, device: torch.device) -> "Nvfp4Activations":
        """See ``Weight``."""
        rows, num_columns = torch.arange(end - begin, device=device), self.shape[1]
        codes = torch.zeros(end - begin, num_columns, dtype=torch.uint8, device=device)
        codes[rows, rows + begin] = _ONE_E2M1
        scale = torch.ones(end - begin, num_columns // BLOCK_SIZE, device=device).to(torch.float8_e4m3fn)
        return Nvfp4Activations(pack_e2m1(codes), scale, 1.0)

    def activations(self, values: Tensor) -> "Nvfp4Activations":
        """See ``Weight``."""
        tensor_scale = shared_global_scale([values])
        packed, block_scale = quantize_nvfp4(values, tensor_scale)
        return Nvfp4Activations(packed, block_scale, float(tensor_scale))

    def mutants(self) -> dict[str, Weight]:
        """See ``Weight``."""
        raw = one_row_zero(self.scale.view(torch.uint8)).view(torch.float8_e4m3fn)
        return {
            "nibbles swapped": replace(self, packed=swap_nibbles(self.packed)),
            "scales swizzled": replace(self, scale=swizzle_128x4(self.scale)),
            "one row zero": replace(self, scale=raw),
        }

    def without_bias(self) -> "Nvfp4Weight":
        """The same without its bias."""
        return replace(self, bias=None)

    def columns(self, begin: int, end: int) -> "Nvfp4Weight":
        """See ``Weight``."""
        scale = self.scale[:, begin // BLOCK_SIZE : end // BLOCK_SIZE]
        return replace(self, packed=self.packed[:, begin // 2 : end // 2], scale=scale)


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

    def in_bf16(self) -> Tensor:
        """See ``Weight``."""
        return decode_nvfp4(self.packed, self.scale)

    def part(self, begin: int, end: int) -> "Nvfp4Activations":
        """Rows ``begin`` to ``end``."""
        return Nvfp4Activations(self.packed[begin:end], self.scale[begin:end], self.tensor_scale)

    def to(self, device: torch.device) -> "Nvfp4Activations":
        """The same on a device."""
        return Nvfp4Activations(self.packed.to(device), self.scale.to(device), self.tensor_scale)


def decode_nvfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Codes times block scales, by a table of all bytes: another way than the referee's.

    E2M1 has 2 significant bits and E4M3 4: their product fits BF16.

    Args:
        packed: uint8 [N, K/2], low nibble first.
        scale: float8_e4m3fn [N, K/16], row-major.

    Returns:
        BF16 [N, K], exact.
    """
    pairs = _pairs(packed.device)[packed.to(torch.int32)]
    blocks = pairs.view(packed.shape[0], -1, BLOCK_SIZE)
    return (blocks * scale.to(torch.bfloat16)[..., None]).view(packed.shape[0], -1)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """BF16 [256, 2]: the low and the high nibble of every byte, from the bits of E2M1."""
    code = torch.arange(16)
    sign, exponent, mantissa = 1 - 2 * (code >> 3), (code >> 1) & 3, (code & 1) / 2
    value = sign * torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
    byte = torch.arange(256)
    return torch.stack((value[byte & 15], value[byte >> 4]), dim=1).to(device, torch.bfloat16)


class _Nvfp4Operands:
    def read(
        self, reader: CheckpointReader, module: PackedModule, layout: Layout, rows: Sequence[int] | None
    ) -> Nvfp4Weight:
        bias = load(reader, module.bias.name) if module.bias is not None and rows is None else None
        name, half = module.weight.name, module.columns // 2
        stored = load(reader, module.scales["weight_scale"].name)
        readings = scale_readings(stored, module.rows, module.columns // BLOCK_SIZE)
        if layout.scales not in readings:
            raise ValueError(f"scales {list(stored.shape)} cannot be read as {layout.scales}")
        scales = readings[layout.scales]
        if rows is None:
            packed = load_weight(reader, name)[: module.rows, :half].contiguous()
        else:
            raw = reader.read_rows(name, rows, module.weight.shape[1], half)
            packed = from_bytes(raw, "U8", (len(rows), half))
            scales = scales.view(torch.uint8)[list(rows)].view(torch.float8_e4m3fn)
        packed = swap_nibbles(packed) if layout.nibbles == "high" else packed
        return Nvfp4Weight(packed, scales, tensor_scale(reader, module, "weight_scale_2"), bias)

    def quantized(self, values: Tensor, bias: Tensor | None, scale: float | None = None) -> Nvfp4Weight:
        factor = shared_global_scale([values]) if scale is None else torch.tensor(scale, device=values.device)
        return Nvfp4Weight(*quantize_nvfp4(values, factor), float(factor), bias)


ENTRY: OperandFormat = _Nvfp4Operands()
