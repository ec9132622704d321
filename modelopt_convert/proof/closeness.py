"""How near dequantized rows are to the base's: several numbers, since no single one sees every fault. Pure.

Relative error alone lets a zeroed row, two dropped columns or a global scale 5% off pass; cosine is blind to the scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Good builds measured a gain of 0.979 to 1.020, a worst row of 0.15 and a worst column of 0.49.
GAIN_LIMIT = 0.025
ROW_LIMIT = 0.3
COLUMN_LIMIT = 0.7
# A column that lies far below the outliers of its blocks loses most of itself to any quantizer. It is not held against
# the export where the base, quantized again with the same scales, fares no better than this many times.
INHERENT_FACTOR = 1.1


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near dequantized rows are to the base's.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the base.
        gain: <dequantized, base> / <base, base>: 1.05 if the global scale is 5% too large.
        worst_row: Largest relative error of a row.
        worst_column: Largest relative error of a column, over the sampled rows; columns that the format itself loses
            (``INHERENT_FACTOR``) are left out.
        cosine: Cosine of both as vectors.
    """

    relative_error: float
    gain: float
    worst_row: float
    worst_column: float
    cosine: float

    def within(self, max_error: float) -> bool:
        """Whether all limits hold; NaN is never within."""
        return (
            self.relative_error <= max_error
            and abs(self.gain - 1.0) <= GAIN_LIMIT
            and self.worst_row <= ROW_LIMIT
            and self.worst_column <= COLUMN_LIMIT
        )


def closeness(base: Tensor, dequantized: Tensor, inherent: Tensor | None = None) -> Closeness:
    """Compare rows with the base.

    Args:
        base: float64 [R, K].
        dequantized: float64 [R, K].
        inherent: float64 [K], the error of each column that the format itself costs; None to count every column.
    """
    difference = dequantized - base
    norm, inner = base.norm(), (dequantized * base).sum()
    column_error = difference.norm(dim=0)
    if inherent is not None:
        column_error = column_error.masked_fill(column_error <= INHERENT_FACTOR * inherent, 0.0)
    return Closeness(
        relative_error=_ratio(difference.norm(), norm),
        gain=_ratio(inner, norm * norm, of_nothing=1.0),
        worst_row=_worst(difference.norm(dim=1), base.norm(dim=1)),
        worst_column=_worst(column_error, base.norm(dim=0)),
        cosine=_ratio(inner, norm * dequantized.norm()),
    )


def _ratio(above: Tensor, below: Tensor, of_nothing: float = 0.0) -> float:
    """``above / below``; where both are zero there is nothing to be wrong about."""
    if float(above) == 0.0 and float(below) == 0.0:
        return of_nothing
    return float(above / below)


def _worst(difference: Tensor, norm: Tensor) -> float:
    ratio = torch.where(difference == 0, torch.zeros_like(norm), difference / norm)
    return float(ratio.max())
