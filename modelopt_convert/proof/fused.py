"""What engines lose of fused weights whose parts have global scales of their own, from the scales alone.

An engine has one global scale for a fused weight. SGLang 0.5.23 takes the largest and brings the block scales of the
other parts to it, rounded to E4M3 again (``_rebase_partition_weight_scales`` in ``modelopt_quant.py``). vllm 0.30.0
takes the largest for all parts and leaves the block scales as they are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.proof.tensors import load

_CODES = (
    torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
)  # their values


def fused_losses(reader: CheckpointReader, group: Sequence[str]) -> dict[str, float]:
    """By engine, the relative error that it adds to the weights of a fused group in NVFP4.

    Args:
        reader: The checkpoint, in the canonical layout.
        group: The parts, by module name.
    """
    counts = [_counts(load(reader, f"{name}.weight_scale")) for name in group]
    factors = [float(load(reader, f"{name}.weight_scale_2")) for name in group]
    return {"sglang": rebased_error(counts, factors), "vllm-omni": largest_error(counts, factors)}


def _counts(scales: Tensor) -> Tensor:
    """How often each E4M3 code is among block scales, int64 [256]: an error follows from that alone."""
    return torch.bincount(scales.view(torch.uint8).flatten(), minlength=len(_CODES))


def rebased_error(counts: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Relative error where block scales are brought to the largest global scale and rounded to E4M3.

    Args:
        counts: How often each E4M3 code is among the block scales of each part, int64 [256].
        factors: The global scale of each part.
    """
    top = max(factors)
    rebased = [(_CODES * (factor / top)).to(torch.float8_e4m3fn) for factor in factors]
    return _error([one.to(torch.float32) * top for one in rebased], counts, factors)


def largest_error(counts: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Relative error where the largest global scale counts for every part; arguments as those of ``rebased_error``."""
    return _error([_CODES * max(factors) for _ in factors], counts, factors)


def _error(held: Sequence[Tensor], counts: Sequence[Tensor], factors: Sequence[float]) -> float:
    """By what the engine holds for each code of each part, float32 [256]."""
    error = size = 0.0
    for one, count, factor in zip(held, counts, factors, strict=True):
        wanted = (_CODES * factor).to(torch.float64)
        error += float(((one.to(torch.float64) - wanted).square() * count).nansum())
        size += float((wanted.square() * count).nansum())
    return math.sqrt(error / size)
