"""Operands of a GEMM as a checkpoint stores them, in the canonical layout, and the activations that are packed here.

M is the number of rows of activations, N of output features, K of input features.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm, entry
from modelopt_convert.formats.layout import Layout

RANDOM_ROWS = 64


class Activations(Protocol):
    """Quantized activations.

    Attributes:
        tensor_scale: ``input_scale``.
    """

    @property
    def tensor_scale(self) -> float:
        """The scale of the tensor."""

    def decode(self) -> Tensor:
        """float64 [M, K], without the scale of the tensor."""

    def in_bf16(self) -> Tensor:
        """BF16 [M, K], as exact; see ``Weight``."""

    def part(self, begin: int, end: int) -> "Activations":
        """Rows ``begin`` to ``end``."""

    def to(self, device: torch.device) -> "Activations":
        """The same on a device."""


class Weight(Protocol):
    """A quantized weight, in the canonical layout.

    Attributes:
        algorithm: Its format.
    """

    algorithm: ClassVar[Algorithm]

    @property
    def tensor_scale(self) -> float:
        """The scale of the tensor."""

    @property
    def bias(self) -> Tensor | None:
        """[N] or None."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    def decode(self, begin: int, end: int) -> Tensor:
        """float64 [end - begin, K]: rows of codes times block scales, without the scale of the tensor."""

    def in_bf16(self) -> Tensor:
        """BF16 [N, K], as exact, and decoded in another way than the referee's where codes are not values."""

    def to(self, device: torch.device) -> "Weight":
        """The same on a device."""

    def without_bias(self) -> "Weight":
        """The same without its bias."""

    def columns(self, begin: int, end: int) -> "Weight":
        """Columns ``begin`` to ``end``: whole blocks of them."""

    def one_hot(self, begin: int, end: int, device: torch.device) -> Activations:
        """Rows ``begin`` to ``end`` of the K x K identity in the weight's own format, with a tensor scale of 1.

        A GEMM with them returns columns of the decoded weight, bit for bit: E2M1 times E4M3 fits BF16.
        """

    def activations(self, values: Tensor) -> Activations:
        """float32 values [M, K], quantized to the weight's own format here and not by any backend."""

    def mutants(self) -> Mapping[str, "Weight"]:
        """The same weight, damaged in ways that must be seen."""


class OperandFormat(Protocol):
    """Operands of one format: the entry of a format in this folder."""

    def read(
        self, reader: CheckpointReader, module: PackedModule, layout: Layout, rows: Sequence[int] | None
    ) -> Weight:
        """A module's weight, read as it is declared to lie.

        Args:
            reader: The opened checkpoint.
            module: Which.
            layout: How it is declared to lie.
            rows: Of these rows only, and without its bias; None for all.

        Raises:
            InputError: A scale that cannot be used.
            ValueError: The stored shape does not allow the declared reading.
        """

    def quantized(self, values: Tensor, bias: Tensor | None, scale: float | None = None) -> Weight:
        """A weight made of values [N, K], in the dtype that is divided.

        Args:
            values: BF16, or F32 where ModelOpt divides in F32.
            bias: [N] or None.
            scale: Of the tensor; by max calibration of these values unless given.
        """


def operand_format(algorithm: Algorithm) -> OperandFormat:
    """Operands of a format."""
    found: OperandFormat = entry("modelopt_convert.verification.gemm", algorithm)
    return found


@functools.lru_cache(maxsize=8)  # of the widths of one model, a few MB each: to make them takes longer than the GEMM
def probing_values(num_columns: int) -> Tensor:
    """``random_values`` for every module of a width."""
    return random_values(RANDOM_ROWS, num_columns)


def random_values(num_rows: int, num_columns: int) -> Tensor:
    """Seeded float32 values [M, K] with channels of different size, on the CPU: the same on every machine."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(num_rows, num_columns, generator=generator)
    values *= torch.rand(num_columns, generator=generator).pow(2) * 3 + 0.2
    return values


def random_activations(weight: Weight, num_rows: int, device: torch.device) -> Activations:
    """``random_values``, quantized."""
    return weight.activations(random_values(num_rows, weight.shape[1]).to(device))


def one_row_zero(raw: Tensor) -> Tensor:
    """A copy of bytes [N, C] with one row of zeros."""
    raw = raw.clone()
    raw[77] = 0
    return raw
