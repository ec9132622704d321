"""What a runtime does to operands before a kernel takes them: padding of codes, 128x4 scales. And the epilogue.

Two kinds of padding of 128x4 scales are told apart. Rows past N belong to no output: no kernel may let them into one.
Columns past K/16 belong to every output: a kernel multiplies whole groups of 64 columns, codes of zero times these
scales, so that every runtime zeroes them, and NaN there would fault right kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE, padded_shape, round_up
from modelopt_convert.verification.gemm.fp8 import Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight

_NAN = 0x7F  # in E4M3


@dataclass(frozen=True, slots=True)
class Padded:
    """A weight as a CUTLASS or cuBLAS kernel takes it.

    Attributes:
        codes: [padded N, padded K], or half as many columns of packed codes.
        scale: NVFP4: float8_e4m3fn in the 128x4 order; FP8: None.
        bias: As the backend wants it.
        features: N without padding.
        poison: Whether padding of scales is NaN.
    """

    codes: Tensor
    scale: Tensor | None
    bias: Tensor | None
    features: int
    poison: bool


def pad_fp8(weight: Fp8Weight, alignment: int, *, poison: bool) -> Padded:
    """Pad N and K to multiples of ``alignment``; there are no block scales to poison."""
    rows, columns = weight.shape
    padded = round_up(rows, alignment)
    codes = pad_bytes(weight.codes, padded, round_up(columns, alignment))
    return Padded(codes, None, bf16_bias(weight.bias, padded), rows, poison)


def pad_nvfp4(weight: Nvfp4Weight, row_alignment: int, column_alignment: int, *, poison: bool) -> Padded:
    """Pad N and K, and bring the scales into the 128x4 order; the bias is left as it is."""
    rows, columns = weight.shape
    padded, padded_columns = round_up(rows, row_alignment), round_up(columns, column_alignment)
    codes = pad_bytes(weight.packed, padded, padded_columns // 2)
    scale = kernel_scales(weight.scale, padded_columns // 16, poison=poison)
    return Padded(codes, scale, weight.bias, rows, poison)


def pad_bytes(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Pad with zeros, which are the code of zero in E2M1 and E4M3.

    Args:
        codes: [N, C], any dtype of one byte.
        rows: At least N.
        columns: At least C.

    Returns:
        [rows, columns], contiguous; ``codes`` itself if that is its shape.
    """
    if tuple(codes.shape) == (rows, columns):
        return codes.contiguous()
    padded = torch.zeros(rows, columns, dtype=torch.uint8, device=codes.device)
    padded[: codes.shape[0], : codes.shape[1]] = codes.view(torch.uint8)
    return padded.view(codes.dtype)


def kernel_scales(scale: Tensor, columns: int, *, poison: bool) -> Tensor:
    """Block scales in the 128x4 order.

    Args:
        scale: float8_e4m3fn [N, K/16], row-major.
        columns: K/16 of the padded codes, at least that of ``scale``.
        poison: Fill the rows past N with NaN in place of zeros.

    Returns:
        float8_e4m3fn [N rounded up to 128, columns rounded up to 4].
    """
    rows = scale.shape[0]
    padded = pad_bytes(scale, *padded_shape(rows, columns))
    if poison and padded.shape[0] > rows:
        raw = padded.view(torch.uint8).clone()
        raw[rows:] = _NAN
        padded = raw.view(scale.dtype)
    return swizzle_128x4(padded)


def strided_scales(scale: Tensor, *, poison: bool) -> Tensor:
    """Row-major scales in a larger buffer, for kernels that take a row stride and mask.

    Args:
        scale: float8_e4m3fn [N, K/16].
        poison: Fill what is not in ``scale`` with NaN in place of zeros.

    Returns:
        uint8 [N rounded up to 128, K/16 + 4]: nothing past ``scale`` may be read.
    """
    rows, columns = scale.shape
    buffer = torch.full(
        (round_up(rows, ROW_TILE), columns + 4), _NAN if poison else 0, dtype=torch.uint8, device=scale.device
    )
    buffer[:rows, :columns] = scale.view(torch.uint8)
    return buffer


def bf16_bias(bias: Tensor | None, num_rows: int) -> Tensor | None:
    """A bias [N] as kernels with BF16 output take it: BF16 [num_rows], padded with zeros."""
    if bias is None:
        return None
    padded = torch.zeros(num_rows, dtype=torch.bfloat16, device=bias.device)
    padded[: bias.shape[0]] = bias
    return padded


def epilogue(accumulators: Tensor, alpha: float, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``accumulators * alpha + bias`` in float64 as the referee's, so that only the accumulation can differ.

    Args:
        accumulators: float32 [M, N].
        alpha: Product of both tensor scales.
        bias: [N] or None.
        out: BF16 [M, N] to write into, or None.

    Returns:
        BF16 [M, N].
    """
    result = accumulators.to(torch.float64).mul_(alpha)
    if bias is not None:
        result += bias.to(torch.float64)
    return result.to(torch.bfloat16) if out is None else out.copy_(result)


def deliver(result: Tensor, columns: int, out: Tensor | None) -> Tensor:
    """Cut the padding of an output [M, padded N], and copy it where it is wanted.

    Args:
        result: BF16.
        columns: N.
        out: BF16 [M, N] to write into, or None.
    """
    cut = result[:, :columns]
    return cut if out is None else out.copy_(cut)
