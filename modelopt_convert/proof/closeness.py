"""How near dequantized rows are to the base's: several numbers, since no single one sees every fault. Pure.

Relative error alone lets a zeroed row, two dropped columns or a global scale 5% off pass; cosine is blind to the scale.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.proof.limits import COLUMN_LIMIT, GAIN_LIMIT, INHERENT_FACTOR, ROW_LIMIT


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near dequantized rows are to the base's.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the base.
        gain: <dequantized, base> / <base, base>: 1.05 if the global scale is 5% too large.
        worst_row: Largest relative error of a row.
        worst_column: Largest relative error of a column, over the rows compared; columns that the format itself loses
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


class Nearness:
    """Sums over the rows of a weight from which its closeness follows; float64."""

    def __init__(self, columns: int) -> None:
        """Sum nothing yet: K columns."""
        self._error, self._base, self._inherent = (torch.zeros(columns, dtype=torch.float64) for _ in range(3))
        self._inner = self._squares = 0.0
        self._worst_row = 0.0

    def add(self, base: Tensor, dequantized: Tensor, inherent: Tensor | None = None) -> None:
        """Add some rows, on whatever device.

        Args:
            base: float64 [R, K].
            dequantized: float64 [R, K].
            inherent: float64 [R, K]: what the format itself makes of the base; None to count every column.
        """
        difference = dequantized - base
        self._error += difference.square().sum(dim=0).cpu()
        self._base += base.square().sum(dim=0).cpu()
        self._inner += float((dequantized * base).sum())
        self._squares += float(dequantized.square().sum())
        self._worst_row = _larger(self._worst_row, _worst(difference.norm(dim=1), base.norm(dim=1)))
        if inherent is not None:
            self._inherent += (inherent - base).square().sum(dim=0).cpu()

    def closeness(self) -> Closeness:
        """Of the rows so far."""
        error, base = (math.sqrt(float(one.sum())) for one in (self._error, self._base))
        column = self._error.sqrt()
        column = column.masked_fill(column <= INHERENT_FACTOR * self._inherent.sqrt(), 0.0)
        return Closeness(
            relative_error=_ratio(error, base),
            gain=_ratio(self._inner, base * base, of_nothing=1.0),
            worst_row=self._worst_row,
            worst_column=_worst(column, self._base.sqrt()),
            cosine=_ratio(self._inner, base * math.sqrt(self._squares)),
        )


class TiledNearness:
    """``Nearness`` of a weight, and of each strip of at least so many rows.

    Attributes:
        whole: Of all rows so far.
    """

    def __init__(self, columns: int, height: int) -> None:
        """Sum nothing yet: K columns, and the height of a strip."""
        self._columns, self._height = columns, height
        self.whole, self._strip, self._rows, self._worst = Nearness(columns), Nearness(columns), 0, 0.0

    def add(self, base: Tensor, dequantized: Tensor, inherent: Tensor | None = None) -> None:
        """Add the next rows; arguments as those of ``Nearness.add``."""
        self.whole.add(base, dequantized, inherent)
        for top in range(0, len(base), self._height):
            part = slice(top, top + self._height)
            self._strip.add(base[part], dequantized[part])
            self._rows += len(base[part])
            if self._rows >= self._height:
                self._worst = self.worst_strip()
                self._strip, self._rows = Nearness(self._columns), 0

    def worst_strip(self) -> float:
        """Largest relative error of a strip."""
        return _larger(self._worst, self._strip.closeness().relative_error)


def closeness(base: Tensor, dequantized: Tensor, inherent: Tensor | None = None) -> Closeness:
    """Compare rows with the base; arguments as those of ``Nearness.add``."""
    sums = Nearness(base.shape[1])
    sums.add(base, dequantized, inherent)
    return sums.closeness()


def _larger(left: float, right: float) -> float:
    """The larger one; NaN is larger than all."""
    return right if right > left or right != right else left


def _ratio(above: float, below: float, of_nothing: float = 0.0) -> float:
    """``above / below``; where both are zero there is nothing to be wrong about."""
    if below != 0.0:
        return above / below
    return of_nothing if above == 0.0 else above * math.inf


def _worst(difference: Tensor, norm: Tensor) -> float:
    ratio = torch.where(difference == 0, torch.zeros_like(norm), difference / norm)
    return float(ratio.max())
