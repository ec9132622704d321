"""Figures of what is near something else: of tensors, of pictures, and of many of them. Pure.

Cosine, RMSE and PSNR are those of SGLang's ``compare_diffusion_trajectory_similarity``, so that figures line up.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modelopt_convert.fidelity.thresholds import has_lpips

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Student's t of which 95% of a sample lies below, by degrees of freedom from 1; beyond them by its expansion.
_T95 = (
    6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125,
    1.7959, 1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247,
    1.7207, 1.7171, 1.7139, 1.7109, 1.7081, 1.7056, 1.7033, 1.7011, 1.6991, 1.6973,
)  # fmt: skip
_Z95 = 1.6448536269514722


def sqnr_db(energy: float, noise: float) -> float:
    """Signal to noise in decibels of two sums of squares; infinite without noise, 0 where all is noise.

    Args:
        energy: Of the exact values.
        noise: Of the differences.
    """
    if not noise:
        return math.inf
    return 10.0 * math.log10(energy / noise) if energy else 0.0


def cosine(one: Tensor, other: Tensor) -> float:
    """``<x, y> / (|x| |y|)`` over all elements, in float64; 1 where both are zero, 0 where one is."""
    left, right = one.to(torch.float64).flatten(), other.to(torch.float64).flatten()
    size = float(left.norm() * right.norm())
    return float(left @ right) / size if size else float(not left.any() and not right.any())


def rmse(one: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference, in float64."""
    return float((one.to(torch.float64) - other.to(torch.float64)).square().mean().sqrt())


def psnr_db(one: Tensor, other: Tensor) -> float:
    """``-10 log10`` of the mean squared difference of values in 0..1; infinite for equal ones."""
    error = rmse(one, other)
    return -20.0 * math.log10(error) if error else math.inf


def ssim(one: Tensor, other: Tensor) -> float | None:
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03.

    The mean over frames, channels and all places at which the window fits; without any correction of the sample.

    Args:
        one: [F, H, W, 3] in 0..1.
        other: Likewise.

    Returns:
        1 for equal pictures; None where a side is less than 11.
    """
    if min(one.shape[1:3]) < _WINDOW:
        return None
    left, right = (frames.to(torch.float64).movedim(-1, 1).flatten(0, 1)[:, None] for frames in (one, other))
    line = torch.exp(-((torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line = (line / line.sum()).to(left.device)

    def mean(values: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mine, theirs = mean(left), mean(right)
    own, others = mean(left * left) - mine * mine, mean(right * right) - theirs * theirs
    shared = mean(left * right) - mine * theirs
    above = (2 * mine * theirs + _C1) * (2 * shared + _C2)
    return float((above / ((mine * mine + theirs * theirs + _C1) * (own + others + _C2))).mean())


def lpips_measure() -> Callable[[Tensor, Tensor], float] | None:
    """LPIPS (AlexNet) of two pictures [F, H, W, 3] in 0..1, the mean over frames; None without the package."""
    if not has_lpips():
        return None
    return _lpips(_lpips_model())


@functools.cache
def _lpips_model() -> Any:
    lpips: Any = importlib.import_module("lpips")  # installed by few, and without types
    return lpips.LPIPS(net="alex", verbose=False).eval()


def _lpips(model: Any) -> Callable[[Tensor, Tensor], float]:
    def measure(one: Tensor, other: Tensor) -> float:
        with torch.inference_mode():
            return float(model(one.movedim(-1, 1) * 2 - 1, other.movedim(-1, 1) * 2 - 1).mean())

    return measure


@dataclass(frozen=True, slots=True)
class Spread:
    """Many figures as one.

    Attributes:
        mean: Infinite where one of them is.
        std: Of the sample, over n - 1, of the finite ones; None of fewer than two.
        lower95: Bound that the mean is above, with 95% confidence (one-sided, Student's t), of the finite ones.
        upper95: Bound that the mean is below, likewise.
        n: How many there are.
    """

    mean: float
    std: float | None
    lower95: float | None
    upper95: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Many figures as one; where some are infinite, bounds are of the finite ones, which lie lower.

    Args:
        values: At least one.
    """
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(values) / len(values)
    if not finite:
        return Spread(mean, None, mean, mean, len(values))
    if len(finite) < 2:
        return Spread(mean, None, None, None, len(values))
    middle = sum(finite) / len(finite)
    std = math.sqrt(sum((value - middle) ** 2 for value in finite) / (len(finite) - 1))
    half = _t95(len(finite) - 1) * std / math.sqrt(len(finite))
    return Spread(mean, std, middle - half, middle + half, len(values))


def _t95(freedom: int) -> float:
    """The 95% quantile of Student's t; beyond 30 degrees by Cornish and Fisher's expansion (error below 1e-5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
