"""Weights and second moments of inputs for GPTQ; without ModelOpt, which takes long to import."""

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import shared_global_scale
from modelopt_convert.formats.nvfp4.sweep import sweep


def example(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight in BF16, and the second moments of inputs that go together, with outliers, as those of models do."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=draw)
    inputs = torch.randn(3 * columns, columns, generator=draw) @ mixed + torch.randn(columns, generator=draw)
    inputs *= torch.exp(torch.randn(columns, generator=draw))
    weight = (0.02 * torch.randn(rows, columns, generator=draw)).bfloat16()
    return weight, (inputs.T @ inputs).double()


def scaled(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest codes, block scales, tensor scale and the factor of each value."""
    global_scale = shared_global_scale([weight])
    packed, scale = sweep(weight, global_scale, moments.diagonal().float())
    return packed, scale, global_scale, (scale.float() * global_scale).double().repeat_interleave(16, 1)
