"""How far a GEMM's output is from the exact one: several numbers, since no single one sees every fault. Pure.

``calc_diff`` is DeepGEMM's ``1 - 2<x, y> / (|x|^2 + |y|^2)``; its usual limit of 0.02 lets a dropped block of K, a
zeroed row and a global scale 15% off pass. Against the exact product no such slack is needed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.verification.gemm.limits import (
    CALC_DIFF_LIMIT,
    CALC_DIFF_WARN,
    COLUMN_LIMIT,
    GAIN_LIMIT,
    ROW_LIMIT,
)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Distances of an output from the exact one.

    Attributes:
        calc_diff: See above; 0 for equal.
        relative_frobenius: Norm of the difference over that of the exact one.
        gain: <output, exact> / <exact, exact>.
        worst_row: Largest relative error of a row of activations.
        worst_column: Largest relative error of an output feature.
        sqnr_db: Signal to noise in decibels; infinite for equal.
        finite: Whether every output is.
    """

    calc_diff: float
    relative_frobenius: float
    gain: float
    worst_row: float
    worst_column: float
    sqnr_db: float
    finite: bool

    @property
    def status(self) -> str:
        """``pass``; ``warn`` if only ``calc_diff`` is above its limit, and not far; else ``fail``."""
        lines = self.worst_row <= ROW_LIMIT and self.worst_column <= COLUMN_LIMIT
        rest = self.finite and lines and abs(self.gain - 1.0) <= GAIN_LIMIT
        if not rest or not self.calc_diff <= CALC_DIFF_WARN:
            return "fail"
        return "pass" if self.calc_diff <= CALC_DIFF_LIMIT else "warn"


def measure(output: Tensor, exact: Tensor, spread: Tensor) -> Metrics:
    """Compare [M, N] with the exact float64 [M, N].

    Args:
        output: What a backend returned.
        exact: From ``reference.exact``.
        spread: From ``reference.spread``: how large the exact values would be if their terms did not cancel.
    """
    got = output.to(torch.float64)
    difference = got - exact
    sums = [exact.square().sum(), difference.square().sum(), (got * exact).sum(), got.square().sum()]
    worst = [_worst(difference, exact, spread, dim) for dim in (1, 0)]
    # Together: for each number that is asked for alone, the GPU runs empty.
    numbers = torch.stack([*sums, *worst, got.isfinite().all().to(torch.float64)]).tolist()
    energy, noise, inner, mine, worst_row, worst_column, is_finite = numbers
    if not is_finite:
        return Metrics(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, False)
    total = mine + energy
    return Metrics(
        calc_diff=1.0 - 2.0 * inner / total if total else 0.0,
        relative_frobenius=math.sqrt(noise / energy) if energy else math.inf if noise else 0.0,
        gain=inner / energy if energy else 1.0,
        worst_row=worst_row,
        worst_column=worst_column,
        sqnr_db=10.0 * math.log10(energy / noise) if noise and energy else math.inf if energy else 0.0,
        finite=True,
    )


def _worst(difference: Tensor, exact: Tensor, spread: Tensor, dim: int) -> Tensor:
    # What cancels is measured against its terms: FP8 tensor cores cut off the low bits of every term, so that with one
    # row of activations an output of nearly zero is off by up to 80% in a right kernel.
    size = torch.maximum(exact.norm(dim=dim), spread.norm(dim=dim))
    error = difference.norm(dim=dim)
    return torch.where(error == 0, torch.zeros_like(error), error / size).max()
