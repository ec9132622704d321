"""SGLang's CUTLASS GEMMs, of the package ``sglang-kernel`` (once ``sgl-kernel``); both import as ``sgl_kernel``.

``cutlass_scaled_fp4_mm`` needs Blackwell and a release that has it: ``sglang-kernel`` 0.4.4 has it no more.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import (
    Padded,
    deliver,
    epilogue,
    kernel_scales,
    pad_bytes,
    pad_fp8,
    pad_nvfp4,
)
from modelopt_convert.verification.gemm.backends.torch_scaled import refusal
from modelopt_convert.verification.gemm.fp8 import Fp8Activations, Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Activations, Nvfp4Weight

_FP8_ALIGNMENT = 16  # of K; of N 8, whose output rows are to be multiples of 16 bytes
_NVFP4_ALIGNMENT = 32  # of N and K


def _library() -> ModuleType:
    return importlib.import_module("sgl_kernel")


def missing(function: str) -> str | None:
    """Why a function of the package cannot be called, as far as importing it tells, or None."""
    try:
        library = _library()
    except ImportError as error:  # also what it raises where its binaries do not load, over many lines
        return "sgl_kernel is not installed" if error.name == "sgl_kernel" else "sgl_kernel's binaries do not load here"
    return None if hasattr(library, function) else f"this release of sgl_kernel has no {function}"


class SglFp8:
    """``fp8_scaled_mm``: a scale for every row of activations and of the weight, as SGLang spreads tensor scales.

    On Hopper it accumulates fast, always (``FP8FastAccum`` in csrc/gemm/fp8_gemm_kernel.cu): its error grows with K.
    """

    name = "sgl-kernel"
    kind: Kind = "native"
    formats: frozenset[Algorithm] = frozenset({"fp8"})

    def unavailable(self, device: torch.device) -> str | None:
        """Asked by multiplying a small layer."""
        return _refusal_fp8(device)

    def prepare(self, weight: Fp8Weight, *, poison: bool) -> Padded:
        """Pad N and K to 16; there are no block scales to poison."""
        return pad_fp8(weight, _FP8_ALIGNMENT, poison=poison)

    def gemm(self, prepared: Padded, activations: Fp8Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Alpha goes in as the scales of the weight."""
        num_rows, device = activations.codes.shape[0], activations.codes.device
        result = _library().fp8_scaled_mm(
            pad_bytes(activations.codes, num_rows, prepared.codes.shape[1]),
            prepared.codes.T,
            torch.ones(num_rows, 1, device=device),
            torch.full((prepared.codes.shape[0], 1), alpha, device=device),
            torch.bfloat16,
            prepared.bias,
        )
        return deliver(result, prepared.features, out)


class SglNvfp4:
    """``cutlass_scaled_fp4_mm``."""

    name = "sgl-kernel"
    kind: Kind = "native"
    formats: frozenset[Algorithm] = frozenset({"nvfp4"})

    def unavailable(self, device: torch.device) -> str | None:
        """Asked by multiplying a small layer."""
        return _refusal_nvfp4(device)

    def prepare(self, weight: Nvfp4Weight, *, poison: bool) -> Padded:
        """Pad N and K to 32; scales in the 128x4 order."""
        return pad_nvfp4(weight, _NVFP4_ALIGNMENT, _NVFP4_ALIGNMENT, poison=poison)

    def gemm(self, prepared: Padded, activations: Nvfp4Activations, alpha: float, out: Tensor | None) -> Tensor:
        """The kernel takes no bias: SGLang adds it to the BF16 result, and so does this."""
        half = prepared.codes.shape[1]
        num_rows, device = activations.packed.shape[0], activations.packed.device
        result = _library().cutlass_scaled_fp4_mm(
            pad_bytes(activations.packed, num_rows, half),
            prepared.codes,
            kernel_scales(activations.scale, half // 8, poison=prepared.poison),
            prepared.scale,
            torch.tensor(alpha, dtype=torch.float32, device=device),
            torch.bfloat16,
        )
        if prepared.bias is None:
            return deliver(result, prepared.features, out)
        return epilogue(result[:, : prepared.features].to(torch.float32), 1.0, prepared.bias, out)


@functools.cache
def _refusal_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    lacks = missing("fp8_scaled_mm")
    if lacks is not None:
        return lacks
    codes = torch.zeros(32, 32, device=device).to(torch.float8_e4m3fn)
    backend = SglFp8()
    weight, activations = Fp8Weight(codes, 1.0), Fp8Activations(codes, 1.0)
    return refusal(lambda: backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, None))


@functools.cache
def _refusal_nvfp4(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    lacks = missing("cutlass_scaled_fp4_mm")
    if lacks is not None:
        return lacks
    packed = torch.zeros(128, 64, dtype=torch.uint8, device=device)
    scale = torch.ones(128, 8, device=device).to(torch.float8_e4m3fn)
    backend = SglNvfp4()
    weight, activations = Nvfp4Weight(packed, scale, 1.0), Nvfp4Activations(packed, scale, 1.0)
    return refusal(lambda: backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, None))
