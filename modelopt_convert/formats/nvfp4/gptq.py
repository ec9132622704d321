"""GPTQ for NVFP4: codes that make up for each other's errors, column by column; the same bits on every device.

Frantar et al., "GPTQ" (2022): a column is rounded, and what rounding changed is taken back in the columns that are not
rounded yet, as far as inputs go together. How far that is, the inputs' second moments say, through the inverse of their
upper triangular factor (``compensation``). Block scales are given: they are not chosen here.

A sum of products has other bits in another order, and every device adds in its own. So factor and errors are whole
numbers here: of 15 bits, by a power of two for each column, and of 23, by one for each row. Their products have 38
bits, and 32,768 of them add up to 53 at most: float64 holds every partial sum, and no order changes a bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import decode_e2m1, encode_e2m1, pack_e2m1
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import PANEL, num_stored

VALUES = 1 << 22
"""Of a weight that are worked on at a time on a CPU: enough for the product, and about 120 MB of float64."""
MOST_COLUMNS = 1 << 15
_FACTOR_BITS, _ERROR_BITS = 15, 23
MOST_ERROR = 2.0**_ERROR_BITS
RoundPanel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Shares of the mean of the diagonal that are added to it; the first is GPTQ's own."""


@dataclass(frozen=True, slots=True)
class Compensation:
    """How much of a column's rounding error each later column takes back.

    Attributes:
        panels: int16 [``num_stored(K)``]: the columns 128 at a time, each panel row-major, and of each the rows down to
            its last column: all above is stored, nothing below. The diagonal, which is 1, and what is left of it are 0.
        exponents: int16 [K]: a column is its whole numbers times 2 to this.
    """

    panels: Tensor
    exponents: Tensor

    @classmethod
    def from_bytes(cls, panels: bytes, exponents: bytes) -> "Compensation":
        """As ``mopt calibrate`` stores it."""
        # A buffer of one's own: torch warns of memory that it may not write to.
        return cls(*(torch.frombuffer(bytearray(raw), dtype=torch.int16) for raw in (panels, exponents)))

    def to(self, device: torch.device) -> "Compensation":
        """The same on a device."""
        return Compensation(self.panels.to(device), self.exponents.to(device))

    def panel(self, first: int) -> Tensor:
        """float64 [columns, rows] of the panel that begins with a column, transposed, as whole numbers."""
        columns = len(self.exponents)
        width, height = min(PANEL, columns - first), min(first + PANEL, columns)
        begin = num_stored(first)
        stored = self.panels[begin : begin + width * height].view(height, width)
        return stored.t().to(torch.float64, memory_format=torch.contiguous_format)


def compensation(moments: Tensor, least: float = DAMPING[0]) -> tuple[Compensation, float]:
    """What GPTQ has to know of the inputs.

    With ``H = U D U^T``, U unit upper triangular, the rows of ``U^-1`` are those of GPTQ's ``cholesky(H^-1)^T``, each
    divided by its diagonal.

    Args:
        moments: float64 [K, K]: the sum of the products of each two input channels; any factor of it gives the same.
        least: The share of the diagonal's mean that is added to it, one of ``DAMPING``. The more, the less is
            compensated, and the nearer weights stay to what they were.

    Returns:
        The compensation, and the share that was added: more where the matrix is singular up to rounding, and 0 where
        there is nothing to add to.

    Raises:
        ValueError: K is above 32,768, a moment is not finite, or they are no moments.
    """
    columns = len(moments)
    if columns > MOST_COLUMNS:
        raise ValueError(f"expected at most {MOST_COLUMNS} columns, found {columns}")
    if not bool(moments.isfinite().all()):
        raise ValueError("expected finite moments")
    mean = moments.diagonal().mean()
    if not bool(mean > 0):
        return _stored(torch.zeros_like(moments)), 0.0  # inputs of zeros: nothing goes together
    for share in (one for one in DAMPING if one >= least):
        damped = moments.flip(0, 1).div_(mean)
        damped.diagonal().add_(share)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # three matrices at a time: of 15,360 columns one is 1.9 GB
        if not bool(failed):
            break
    else:
        raise ValueError("expected sums of squares of inputs, found a matrix that is none")
    lower /= lower.diagonal().clone()
    inverse = torch.eye(columns, dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, unitriangular=True, out=inverse)
    return _stored(inverse.flip(0, 1).triu_(1)), share


def _stored(above: Tensor) -> Compensation:
    """Whole numbers of a strictly upper triangular matrix, in panels."""
    exponents = torch.frexp(above.abs().amax(dim=0)).exponent - _FACTOR_BITS
    most = 2**_FACTOR_BITS - 1
    whole = torch.ldexp(above, -exponents).round_().clamp_(-most, most).to(torch.int16)
    columns = len(above)
    panels = [whole[: first + PANEL, first : first + PANEL].reshape(-1) for first in range(0, columns, PANEL)]
    return Compensation(torch.cat(panels).cpu(), exponents.to(torch.int16).cpu())


def gptq_codes(weight: Tensor, scale: Tensor, weight_scale_2: Tensor, found: Compensation) -> Tensor:
    """Codes of whole rows under given block scales; rows do not depend on each other.

    Args:
        weight: [N, K] in BF16, F16 or F32, finite; K a multiple of 16.
        scale: float8_e4m3fn [N, K/16], row-major.
        weight_scale_2: float32 [], the tensor scale.
        found: Of the inputs; on the device of the weight.

    Returns:
        Packed codes uint8 [N, K/2], low nibble first.
    """
    count, columns = weight.shape
    wanted = weight.t().to(torch.float64, memory_format=torch.contiguous_format)  # a column beside itself in memory
    factors = (scale.to(torch.float32) * weight_scale_2).t().to(torch.float64, memory_format=torch.contiguous_format)
    # No error of a row is as large as four times its largest value, unless errors run away.
    step = torch.ldexp(torch.ones_like(wanted[0]), torch.frexp(wanted.abs().amax(dim=0)).exponent + 2 - _ERROR_BITS)
    units = torch.ldexp(torch.ones(columns, dtype=torch.float64, device=weight.device), found.exponents)
    errors = torch.empty(columns, count, dtype=torch.float64, device=weight.device)
    codes = torch.empty(columns, count, dtype=torch.uint8, device=weight.device)
    round_panel = _panel_rounder(weight.device)
    for first in range(0, columns, PANEL):
        panel = found.panel(first)
        end = first + len(panel)
        unit = units[first:end, None]
        if first:  # whole numbers until here; by powers of two, no digit is lost
            wanted[first:end] -= (panel[:, :first] @ errors[:first]).mul_(unit).mul_(step)
        within = (panel[:, first:] * unit).t().contiguous()
        blocks = slice(first // BLOCK_SIZE, -(-end // BLOCK_SIZE))
        round_panel(wanted[first:end], within, factors[blocks], step, errors[first:end], codes[first:end])
    return pack_e2m1(codes.t().clone(memory_format=torch.contiguous_format))


def _panel_rounder(device: torch.device) -> RoundPanel:
    """What rounds a panel, column by column: on a GPU one kernel, where triton is there to compile it."""
    if device.type == "cuda" and find_spec("triton"):
        from modelopt_convert.formats.nvfp4.panel_kernel import round_panel as by_kernel

        return by_kernel
    return round_panel


def round_panel(wanted: Tensor, within: Tensor, factors: Tensor, step: Tensor, errors: Tensor, codes: Tensor) -> None:
    """Round a panel column by column, and take each error back in the columns to its right.

    Args:
        wanted: float64 [W, N], the panel's columns; is changed.
        within: float64 [W, W]: row by row how much each later column takes back.
        factors: float64 [W/16, N], of each block's codes.
        step: float64 [N]: the unit of errors, a power of two.
        errors: float64 [W, N]: gets whole numbers.
        codes: uint8 [W, N]: gets codes.
    """
    for column in range(len(wanted)):
        value, factor = wanted[column], factors[column // BLOCK_SIZE]
        code = encode_e2m1((value / factor).to(torch.float32))
        codes[column] = code
        error = (value - decode_e2m1(code).to(torch.float64) * factor).div_(step).round_()
        errors[column] = error.clamp_(-MOST_ERROR, MOST_ERROR)
        # The product is exact, so that it is the same whether the device rounds it before it subtracts or not.
        wanted[column + 1 :].addr_(within[column, column + 1 :], error * step, alpha=-1)
