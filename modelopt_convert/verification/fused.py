"""What engines lose of fused weights whose parts have global scales of their own, from the scales alone.

An engine has one global scale for a fused weight. SGLang 0.5.23 takes the largest and brings the block scales of the
other parts to it, rounded to E4M3 again (``_rebase_partition_weight_scales`` in ``modelopt_quant.py``). vllm 0.30.0
takes the largest for all parts and leaves the block scales as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.proof.tensors import load


def fused_losses(reader: CheckpointReader, group: Sequence[str]) -> dict[str, float]:
    """By engine, the relative error that it adds to the weights of a fused group in NVFP4.

    Args:
        reader: The checkpoint, in the canonical layout.
        group: The parts, by module name.
    """
    scales = [load(reader, f"{name}.weight_scale").to(torch.float32) for name in group]
    factors = [float(load(reader, f"{name}.weight_scale_2")) for name in group]
    return {"sglang": rebased_error(scales, factors), "vllm-omni": largest_error(scales, factors)}


def rebased_error(scales: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Relative error where block scales are brought to the largest global scale and rounded to E4M3.

    Args:
        scales: Block scales of each part, float32 [N, K/16], the values of their E4M3 codes.
        factors: The global scale of each part.
    """
    top = max(factors)
    rebased = [(one * (factor / top)).to(torch.float8_e4m3fn) for one, factor in zip(scales, factors, strict=True)]
    return _error([one.to(torch.float32) * top for one in rebased], scales, factors)


def largest_error(scales: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Relative error where the largest global scale counts for every part; arguments as those of ``rebased_error``."""
    return _error([one * max(factors) for one in scales], scales, factors)


def _error(held: Sequence[Tensor], scales: Sequence[Tensor], factors: Sequence[float]) -> float:
    wanted = torch.cat([(one * factor).flatten() for one, factor in zip(scales, factors, strict=True)])
    found = torch.cat([one.flatten() for one in held])
    return float((found - wanted).norm() / wanted.norm())
