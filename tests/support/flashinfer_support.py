"""Weights, and which probes a backend fails, for the tests of flashinfer's backends."""

from collections.abc import Iterator
from typing import Any

import torch

from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.probes import identity_probe, poison_probe, random_probe, sweep_probe

CPU = torch.device("cpu")
GEMMS = ("trtllm", "cutlass", "cudnn", "b12x", "auto")
# Whole tiles; N and K/16 of no kernel's multiple; a K/16 that is odd; FLUX's proj_out in small; less than a tile.
SHAPES = ((256, 128), (200, 80), (96, 208), (192, 960), (48, 16))
PROBES = {"identity": identity_probe, "random": random_probe, "sweep": sweep_probe, "poison": poison_probe}


def make_weight(num_rows: int, num_columns: int) -> Nvfp4Weight:
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    values = torch.randn(num_rows, num_columns, generator=generator)
    values *= torch.rand(num_columns, generator=generator).pow(3) * 6 + 0.3
    values = values.to(torch.bfloat16)
    tensor_scale = shared_global_scale([values])
    packed, scale = quantize_nvfp4(values, tensor_scale)
    bias = torch.randn(num_rows, generator=generator).to(torch.bfloat16)
    return Nvfp4Weight(packed, scale, float(tensor_scale), bias)


def _not_passing(backend: Any, weight: Nvfp4Weight) -> Iterator[str]:
    for name, probe in PROBES.items():
        try:
            passes = probe(backend, weight, CPU).status == "pass"
        except (ValueError, RuntimeError, AssertionError):
            yield "refused"
        else:
            if not passes:
                yield name


@torch_on_one_thread()
def failing(backend: Any, weight: Nvfp4Weight) -> set[str]:
    """The probes that do not pass, and ``refused`` if one could not be run."""
    return set(_not_passing(backend, weight))


@torch_on_one_thread()
def is_seen(backend: Any, weight: Nvfp4Weight) -> bool:
    """Whether any probe does not pass."""
    return next(_not_passing(backend, weight), None) is not None
