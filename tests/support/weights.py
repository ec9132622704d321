"""Weights of every kind that models have, and of kinds that tell a judge little. All seeded."""

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[int, int, torch.Generator], Tensor]


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * 0.02


def outlier_channels(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A few columns far above the rest, as trained transformers have them."""
    return gaussian(rows, columns, generator) * (torch.rand(columns, generator=generator).pow(4) * 8 + 0.5)


def one_outlier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One value so large that the scales of all other blocks underflow, and their codes are small or zero."""
    weight = gaussian(rows, columns, generator)
    weight[_index(rows, generator), _index(columns, generator)] = 5e4
    return weight


def strong_outlier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One value some hundred times the others: their scales are among the smallest, and coarse."""
    weight = gaussian(rows, columns, generator)
    weight[_index(rows, generator), _index(columns, generator)] = 400.0
    return weight


def many_ties(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A largest value, 105 / 1024, under which many values in BF16 are midpoints of two codes.

    The global scale divides by 6 x 448, which has the factor 21: other largest values leave few exact midpoints.
    """
    weight = gaussian(rows, columns, generator).clamp(-0.1, 0.1)
    weight[_index(rows, generator), _index(columns, generator)] = 105 / 1024
    return weight


def two_of_four(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The two smaller of every four are zero."""
    weight = gaussian(rows, columns, generator).unflatten(-1, (-1, 4))
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, weight.abs().topk(2, -1).indices, True)
    return torch.where(kept, weight, 0.0).flatten(-2)


def sparse(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Nine of ten values are zero, so that some blocks are all zero."""
    return gaussian(rows, columns, generator) * (torch.rand(rows, columns, generator=generator) < 0.1)


def ternary(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=generator) * 0.03


def constant_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Every row is one value: neither nibble order nor most scale orders can be told."""
    return torch.randn(rows, 1, generator=generator).expand(rows, columns) * 0.02


def constant(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One value alone: every layout gives the same bytes."""
    return torch.full((rows, columns), 0.02)


def zero_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Two of three rows are zero; the last is not."""
    weight = gaussian(rows, columns, generator)
    weight[torch.arange(rows - 1, -1, -1) % 3 > 0] = 0
    return weight


def zero_blocks(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Half of the blocks of 16 are zero; the first is not."""
    kept = torch.rand(rows, columns // 16, generator=generator) < 0.5
    kept[0, 0] = True
    return gaussian(rows, columns, generator) * kept.repeat_interleave(16, -1)


def tiny(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Near the smallest that F16 has: most values are subnormal there."""
    return gaussian(rows, columns, generator) * 1e-4


def wide(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows whose sizes span eight decades: scales at both ends of E4M3, some underflow."""
    return gaussian(rows, columns, generator) * 10 ** (8 * torch.rand(rows, 1, generator=generator) - 7)


def one_row_tells(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One value everywhere but in one row, so that a look at a few rows tells no layout from another."""
    weight = constant(rows, columns, generator)
    weight[_index(rows, generator)] = gaussian(1, columns, generator)[0]
    return weight


def one_block_tells(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The same with a single block."""
    weight, block = constant(rows, columns, generator), _index(columns // 16, generator)
    weight[_index(rows, generator), 16 * block : 16 * block + 16] = gaussian(1, 16, generator)[0]
    return weight


DISTRIBUTIONS: dict[str, Make] = {
    make.__name__: make
    for make in (
        gaussian,
        outlier_channels,
        one_outlier,
        strong_outlier,
        many_ties,
        two_of_four,
        sparse,
        ternary,
        constant_rows,
        constant,
        zero_rows,
        zero_blocks,
        tiny,
        wide,
    )
}

# What a search changes in these is too little to be taken for a search.
NEARLY_CONSTANT: dict[str, Make] = {make.__name__: make for make in (one_row_tells, one_block_tells)}


def weight(
    kind: str, rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16, *, through_f16: bool = False
) -> Tensor:
    """A weight [N, K] that is not all zero.

    Args:
        kind: A name of ``DISTRIBUTIONS`` or ``NEARLY_CONSTANT``.
        rows: N.
        columns: K, a multiple of 16.
        seed: Other seeds, other values.
        dtype: As the base stores it.
        through_f16: Whether the values were rounded to F16 first, as by an exporter that loads the model in Half.
    """
    made = (DISTRIBUTIONS | NEARLY_CONSTANT)[kind](rows, columns, torch.Generator().manual_seed(seed))
    if not made.any():
        made[0, 0] = 0.02
    return (made.half() if through_f16 else made).to(dtype)


def _index(length: int, generator: torch.Generator) -> int:
    return int(torch.randint(length, (), generator=generator))
