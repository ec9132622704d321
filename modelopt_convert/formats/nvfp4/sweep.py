"""Better block scales for NVFP4: of ten E4M3 scales a block gets the one with the least squared error.

Max calibration lets the largest value of a block come out at 6, the largest code. The gap below 6 is wide: values
around 5 lose most there. A larger scale brings the largest value to 4 or 3, where codes are denser; a smaller one clips
it, and is finer for all others. What a scale costs is known exactly, so a block is tried under each. Codes are the
nearest, the tensor scale is max calibration's, and the layout is the same: engines see no difference.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from modelopt_convert.formats.format import Weights
from modelopt_convert.formats.nvfp4.codes import (
    PART,
    decode_e2m1,
    e4m3_values,
    encode_e2m1,
    kernel_tables,
    max_scales,
    pack_e2m1,
    quantize_nvfp4,
)
from modelopt_convert.formats.nvfp4.compiled import STEPS, sweep_blocks
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.gptq import Compensation, gptq_codes

_LEAST, _MOST = 0x01, 0x7E  # bytes of 2^-9 and 448: what ModelOpt clamps scales to


def sweep(weight: Tensor, weight_scale_2: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight, with the best of ten scales for each block.

    Positive E4M3 bytes are in the order of their values, eight to a doubling. The candidates are the byte of max
    calibration (``quantize_nvfp4``), two bytes below it and seven above, kept within 2^-9 and 448. Of all 126 positive
    scales the best was never found further away on the weights measured in docs/fidelity.md; the scale of the
    four-over-six rule, ``amax / (4 * weight_scale_2)``, is four or five bytes above, and so a candidate, too.

    The error of a block is the sum of ``importance * (code * f32(scale * weight_scale_2) - value)^2`` over its values
    in float64, lanes 8 to 15 added to 0 to 7, then 4 to 7 to 0 to 3, and so on: these are elementwise operations, which
    give the same bits on every device and in pieces of any size. Max calibration's scale stands unless another one is
    better, and of equal ones the larger is taken: no block's error rises, and what nothing improves is left alone.

    Args:
        weight: [N, K] in BF16, F16 or F32, finite; K a multiple of 16.
        weight_scale_2: float32 [], the tensor scale.
        importance: [K], not negative: how much an error in each input channel weighs; None for all alike.

    Returns:
        Packed codes uint8 [N, K/2], low nibble first, and scales float8_e4m3fn [N, K/16], row-major.

    Raises:
        ValueError: K is not a multiple of 16, or ``importance`` has another length.
    """
    columns = weight.shape[-1]
    if columns % BLOCK_SIZE:
        raise ValueError(f"K must be a multiple of {BLOCK_SIZE}, found {list(weight.shape)}")
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance must be [{columns}], as the weight has columns, found {list(importance.shape)}")
    if importance is None:
        importance = torch.ones(BLOCK_SIZE, device=weight.device)  # of one block: a row has as many as there are
    weights = importance.to(torch.float64).view(-1, BLOCK_SIZE).contiguous()
    blocks = weight.reshape(-1, BLOCK_SIZE).contiguous()
    packed = torch.empty(len(blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(blocks), dtype=torch.uint8, device=weight.device)
    with torch.inference_mode():
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and len(blocks):
            by_amax, bounds = kernel_tables(blocks.dtype, float(weight_scale_2))
            halves = _factors(weight_scale_2) / 2
            given, taken = blocks.data_ptr(), (packed.data_ptr(), scale.data_ptr())
            tables = by_amax.data_ptr(), bounds.data_ptr()
            sweep_blocks(given, *tables, *taken, len(blocks), halves.data_ptr(), weights.data_ptr(), len(weights))
        else:
            for part, of_columns in _parts(blocks, weights):
                _sweep(blocks[part], weight_scale_2, of_columns, packed[part], scale[part])
    shape = weight.shape[:-1]
    return packed.reshape(*shape, -1), scale.view(torch.float8_e4m3fn).reshape(*shape, -1)


def _parts(blocks: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some blocks at a time, with the importance of their columns [M, 16], or [1, 16]."""
    rows = max(1, (PART // BLOCK_SIZE if blocks.device.type == "cpu" else len(blocks)) // len(weights))
    for top in range(0, len(blocks), rows * len(weights)):
        count = min(rows * len(weights), len(blocks) - top)
        yield slice(top, top + count), weights if len(weights) == 1 else weights.repeat(count // len(weights), 1)


def _factors(weight_scale_2: Tensor) -> Tensor:
    """float64 [256]: the factor of codes under every scale."""
    return (e4m3_values(weight_scale_2.device) * weight_scale_2).to(torch.float64)


def _sweep(blocks: Tensor, weight_scale_2: Tensor, weights: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Write packed codes [M, 8] and scale bytes [M] of blocks [M, 16]."""
    factors, singles = _factors(weight_scale_2), blocks.to(torch.float32)
    wanted = singles.to(torch.float64)
    middle = max_scales(blocks.abs().amax(dim=-1), weight_scale_2).view(torch.uint8).int()
    least = torch.full(middle.shape, torch.inf, dtype=torch.float64, device=blocks.device)
    best, codes = middle.clone(), torch.zeros_like(blocks, dtype=torch.uint8)
    for step in STEPS:
        candidate = (middle + step).clamp_(_LEAST, _MOST)
        factor = factors[candidate].unsqueeze(1)
        tried = encode_e2m1(singles / factor.to(torch.float32))
        error = (decode_e2m1(tried).to(torch.float64) * factor - wanted).square_().mul_(weights)
        width = BLOCK_SIZE
        while width > 1:
            width //= 2
            error = error[:, :width] + error[:, width:]
        better = error[:, 0] < least
        least = torch.where(better, error[:, 0], least)
        best = torch.where(better, candidate, best)
        codes = torch.where(better.unsqueeze(1), tried, codes)
    scale.copy_(best)
    packed.copy_(pack_e2m1(codes))


QUANTIZERS: Mapping[Weights, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "max": quantize_nvfp4,
    "sweep": sweep,
}
"""What makes codes and block scales of a weight and its tensor scale alone."""


def quantize(
    weights: Weights,
    weight: Tensor,
    weight_scale_2: Tensor,
    importance: Tensor | None = None,
    compensation: Compensation | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and block scales by a rule.

    Args:
        weights: The rule.
        weight: As ``sweep`` takes it.
        weight_scale_2: Likewise.
        importance: For ``sweep-weighted`` and ``gptq``, which cannot do without.
        compensation: For ``gptq``, likewise.
    """
    if importance is None:
        return QUANTIZERS[weights](weight, weight_scale_2)
    packed, scale = sweep(weight, weight_scale_2, importance)
    if compensation is not None:
        packed = gptq_codes(weight, scale, weight_scale_2, compensation)
    return packed, scale
