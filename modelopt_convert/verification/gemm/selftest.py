"""Is a backend itself right? On a made-up layer it must pass the identity probe and fail three damaged ones.

Only then does its word count about a checkpoint: a wrong kernel and a wrong checkpoint are told apart.
"""

import torch

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.operands import Weight, operand_format
from modelopt_convert.verification.gemm.probes import identity_probe, poison_probe, sweep_probe

_SHAPE = (256, 512)  # whole tiles, so that swizzled scales have the same shape


def synthetic(algorithm: Algorithm, device: torch.device) -> Weight:
    """A seeded weight with outlier channels and a bias."""
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(*_SHAPE, generator=generator) * (torch.rand(_SHAPE[1], generator=generator).pow(4) * 8 + 0.5)
    bias = torch.randn(_SHAPE[0], generator=generator).to(torch.bfloat16)
    return operand_format(algorithm).quantized(values.to(torch.bfloat16), bias).to(device)


class _Preparing:
    """A backend that is given another weight than the one it is judged by."""

    def __init__(self, backend: Backend, damaged: Weight) -> None:
        self._backend, self._damaged = backend, damaged.without_bias()
        self.name, self.kind, self.formats = backend.name, backend.kind, backend.formats
        self.unavailable, self.gemm = backend.unavailable, backend.gemm

    def prepare(self, weight: Weight, *, poison: bool) -> object:
        del weight
        return self._backend.prepare(self._damaged, poison=poison)


def self_test(backend: Backend, algorithm: Algorithm, device: torch.device) -> str | None:
    """Why the backend cannot be trusted, or None."""
    weight = synthetic(algorithm, device)
    for probe in (identity_probe, sweep_probe, poison_probe):
        found = probe(backend, weight, device)
        if found.status == "fail":
            return f"fails the {found.probe} probe on a layer known to be right: {found.detail}"
    for name, damaged in weight.mutants().items():
        if identity_probe(_Preparing(backend, damaged), weight, device).status != "fail":
            return f"passes a layer with {name}"
    return None
