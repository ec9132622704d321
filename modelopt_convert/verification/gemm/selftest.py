"""Is a backend itself right? On a made-up layer it must pass the identity probe and fail three damaged ones.

Only then does its word count about a checkpoint: a wrong kernel and a wrong checkpoint are told apart.
"""

from dataclasses import replace

import torch

from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale, swap_nibbles
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.operands import Fp8Weight, Nvfp4Weight, Weight
from modelopt_convert.verification.gemm.probes import identity_probe, poison_probe, sweep_probe

_SHAPE = (256, 512)  # whole tiles, so that swizzled scales have the same shape


def synthetic(algorithm: str, device: torch.device) -> Weight:
    """A seeded weight with outlier channels and a bias."""
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(*_SHAPE, generator=generator) * (torch.rand(_SHAPE[1], generator=generator).pow(4) * 8 + 0.5)
    bias = torch.randn(_SHAPE[0], generator=generator).to(torch.bfloat16)
    values = values.to(torch.bfloat16)
    if algorithm == "fp8":
        scale = values.abs().amax().to(torch.float32) / 448.0
        return Fp8Weight(quantize_fp8(values, scale), float(scale), bias).to(device)
    tensor_scale = shared_global_scale([values])
    packed, scale = quantize_nvfp4(values, tensor_scale)
    return Nvfp4Weight(packed, scale, float(tensor_scale), bias).to(device)


def mutants(weight: Weight) -> dict[str, Weight]:
    """The same layer, damaged: each must be seen."""
    if isinstance(weight, Fp8Weight):
        raw = weight.codes.view(torch.uint8)
        return {
            "signs flipped": replace(weight, codes=(raw ^ 0x80).view(torch.float8_e4m3fn)),
            "columns swapped": replace(
                weight, codes=raw.view(raw.shape[0], -1, 2).flip(-1).reshape(raw.shape).view(torch.float8_e4m3fn)
            ),
            "one row zero": replace(weight, codes=_row_zero(raw).view(torch.float8_e4m3fn)),
        }
    return {
        "nibbles swapped": replace(weight, packed=swap_nibbles(weight.packed)),
        "scales swizzled": replace(weight, scale=swizzle_128x4(weight.scale)),
        "one row zero": replace(weight, scale=_row_zero(weight.scale.view(torch.uint8)).view(torch.float8_e4m3fn)),
    }


def _row_zero(raw: torch.Tensor) -> torch.Tensor:
    raw = raw.clone()
    raw[77] = 0
    return raw


class _Preparing:
    """A backend that is given another weight than the one it is judged by."""

    def __init__(self, backend: Backend, damaged: Weight) -> None:
        self._backend, self._damaged = backend, replace(damaged, bias=None)
        self.name, self.kind, self.formats = backend.name, backend.kind, backend.formats
        self.unavailable, self.gemm = backend.unavailable, backend.gemm

    def prepare(self, weight: Weight, *, poison: bool) -> object:
        del weight
        return self._backend.prepare(self._damaged, poison=poison)


def self_test(backend: Backend, algorithm: str, device: torch.device) -> str | None:
    """Why the backend cannot be trusted, or None."""
    weight = synthetic(algorithm, device)
    for probe in (identity_probe, sweep_probe, poison_probe):
        found = probe(backend, weight, device)
        if found.status == "fail":
            return f"fails the {found.probe} probe on a layer known to be right: {found.detail}"
    for name, damaged in mutants(weight).items():
        if identity_probe(_Preparing(backend, damaged), weight, device).status != "fail":
            return f"passes a layer with {name}"
    return None
