"""The referee: decoded codes in float64, on any device."""

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.operands import Activations, Weight

_TILE_ROWS = 1024  # on a CPU
_TILE_VALUES = 1 << 24  # on a GPU: to start a kernel takes longer than a smaller tile; about half a GB of memory


def tile_rows(num_columns: int, device: torch.device) -> int:
    """Rows of so many columns that are decoded to float64 at a time."""
    return _TILE_ROWS if device.type == "cpu" else max(_TILE_ROWS, _TILE_VALUES // num_columns)


class Reference:
    """Exact up to the last rounding, to BF16."""

    name = "reference"
    kind: Kind = "reference"
    formats: frozenset[Algorithm] = frozenset(FORMATS)

    def unavailable(self, device: torch.device) -> str | None:
        """Runs everywhere."""
        del device
        return None

    def prepare(self, weight: Weight, *, poison: bool) -> Weight:
        """Nothing to prepare."""
        del poison
        return weight

    def gemm(self, prepared: Weight, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Of ``exact``, rounded."""
        del out
        return exact(prepared, activations, alpha).to(torch.bfloat16)


def exact(weight: Weight, activations: Activations, alpha: float) -> Tensor:
    """``alpha * activations @ weight.T + bias`` in float64 [M, N], by tiles of rows of the weight."""
    rows, tiles = activations.decode(), []
    height = tile_rows(weight.shape[1], rows.device)
    for begin in range(0, weight.shape[0], height):
        tiles.append(rows @ weight.decode(begin, begin + height).T)
    product = torch.cat(tiles, dim=1).mul_(alpha)
    return product if weight.bias is None else product.add_(weight.bias.to(torch.float64))


def spread(weight: Weight, activations: Activations, alpha: float) -> Tensor:
    """Root of the sum of the squares of what ``exact`` sums up, bias included: float64 [M, N].

    Summed in float32, which is enough for a size and far faster on GPUs that have little float64.
    """
    squares, tiles = activations.decode().to(torch.float32).square(), []
    height = tile_rows(weight.shape[1], squares.device)
    for begin in range(0, weight.shape[0], height):
        tiles.append(squares @ weight.decode(begin, begin + height).to(torch.float32).square().T)
    total = torch.cat(tiles, dim=1).to(torch.float64).mul_(alpha**2)
    return (total if weight.bias is None else total + weight.bias.to(torch.float64).square()).sqrt()
