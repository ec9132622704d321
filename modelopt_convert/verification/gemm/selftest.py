"""Is a backend itself right? On a made-up layer it must pass every probe, and fail with damage to weight or output.

Only then does its word count about a checkpoint: a wrong kernel and a wrong checkpoint are told apart.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.operands import Activations, Weight, operand_format
from modelopt_convert.verification.gemm.probes import identity_probe, poison_probe, sweep_probe

SHAPE = (256, 512)  # whole tiles, so that swizzled scales have the same shape


def _last_row(output: Tensor) -> None:
    output[-1] = 0


def _last_tile(output: Tensor) -> None:
    output[len(output) // 128 * 128 :] = 0


def _stale(output: Tensor) -> None:
    output[512:] = output[: len(output) - 512].clone()


# What a kernel may do to the rows past those that a small M reaches: each with the M at which it must be seen.
_OUTPUTS: dict[str, tuple[int, Callable[[Tensor], None]]] = {
    "the last row of 1000 zero": (1000, _last_row),
    "the last row of 4608 zero": (4608, _last_row),
    "the last tile of 1000 rows zero": (1000, _last_tile),
    "rows of 1000 past 512 stale": (1000, _stale),
    "rows of 4608 past 512 stale": (4608, _stale),
}


def synthetic(algorithm: Algorithm, device: torch.device) -> Weight:
    """A seeded weight with outlier channels and a bias."""
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(*SHAPE, generator=generator) * (torch.rand(SHAPE[1], generator=generator).pow(4) * 8 + 0.5)
    bias = torch.randn(SHAPE[0], generator=generator).to(torch.bfloat16)
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


class _Recording:
    """A backend whose outputs are kept, by M."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.kind, self.formats = backend.name, backend.kind, backend.formats
        self.unavailable, self.prepare = backend.unavailable, backend.prepare
        self.outputs: dict[int, Tensor] = {}

    def gemm(self, prepared: Any, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        output = self._backend.gemm(prepared, activations, alpha, out)
        self.outputs[len(output)] = output
        return output


class _Returning:
    """A backend that returns what is given."""

    def __init__(self, backend: Backend, output: Tensor) -> None:
        self._output = output
        self.name, self.kind, self.formats = backend.name, backend.kind, backend.formats
        self.unavailable, self.prepare = backend.unavailable, backend.prepare

    def gemm(self, prepared: Any, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        del prepared, activations, alpha, out
        return self._output


@torch_on_one_thread()  # the layer is small: threads cost more than they give, most of all on a busy machine
def self_test(backend: Backend, algorithm: Algorithm, device: torch.device) -> str | None:
    """Why the backend cannot be trusted, or None."""
    weight, recording = synthetic(algorithm, device), _Recording(backend)
    for probe in (identity_probe, sweep_probe, poison_probe):
        found = probe(recording, weight, device)
        if found.status == "fail":
            return f"fails the {found.probe} probe on a layer known to be right: {found.detail}"
    for name, damaged in weight.mutants().items():
        if identity_probe(_Preparing(backend, damaged), weight, device).status != "fail":
            return f"passes a layer with {name}"
    for name, (num_rows, damage) in _OUTPUTS.items():
        output = recording.outputs[num_rows].clone()
        damage(output)
        if sweep_probe(_Returning(backend, output), weight, device, sizes=[num_rows]).status != "fail":
            return f"passes an output with {name}"
    return None
