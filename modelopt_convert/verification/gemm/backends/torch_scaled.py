"""PyTorch's own quantized GEMMs: ``torch._scaled_mm`` for FP8, ``torch.nn.functional.scaled_mm`` for NVFP4.

Both under the name ``torch``, one a format: a GPU may take the one and refuse the other.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import (
    Padded,
    bf16_bias,
    deliver,
    kernel_scales,
    pad_bytes,
    pad_fp8,
    pad_nvfp4,
)
from modelopt_convert.verification.gemm.fp8 import Fp8Activations, Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Activations, Nvfp4Weight

_ALIGNMENT = 16  # of N, and of K in FP8
_NVFP4_ALIGNMENT = 32  # of K: torch asks for 16, cuBLASLt needs 32


class TorchFp8:
    """``torch._scaled_mm``, on GPUs of compute capability 8.9 and above, and on CPUs."""

    name = "torch"
    kind: Kind = "native"
    formats: frozenset[Algorithm] = frozenset({"fp8"})

    def unavailable(self, device: torch.device) -> str | None:
        """Asked by multiplying a small layer."""
        return _refusal_fp8(device)

    def prepare(self, weight: Fp8Weight, *, poison: bool) -> Padded:
        """Pad N and K to 16; there are no scales to poison."""
        return pad_fp8(weight, _ALIGNMENT, poison=poison)

    def gemm(self, prepared: Padded, activations: Fp8Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Alpha goes in as the scale of the weight; slow accumulation, since the fast one drifts with K."""
        codes = pad_bytes(activations.codes, activations.codes.shape[0], prepared.codes.shape[1])
        scale = torch.tensor(alpha, dtype=torch.float32, device=codes.device)
        straight = out if prepared.features == prepared.codes.shape[0] else None
        result = torch._scaled_mm(
            codes,
            prepared.codes.T,
            torch.ones_like(scale),
            scale,
            bias=prepared.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
            out=straight,
        )
        return result if straight is not None else deliver(result, prepared.features, out)


class TorchNvfp4:
    """``scaled_mm`` with one E4M3 scale a block of 16, where cuBLASLt takes it."""

    name = "torch"
    kind: Kind = "native"
    formats: frozenset[Algorithm] = frozenset({"nvfp4"})

    def unavailable(self, device: torch.device) -> str | None:
        """Asked by multiplying a small layer: torch itself does not look at the GPU."""
        return _refusal_nvfp4(device)

    def prepare(self, weight: Nvfp4Weight, *, poison: bool) -> Padded:
        """Pad N to 16 and K to 32; scales in the 128x4 order."""
        padded = pad_nvfp4(weight, _ALIGNMENT, _NVFP4_ALIGNMENT, poison=poison)
        return replace(padded, bias=bf16_bias(weight.bias, padded.codes.shape[0]))

    def gemm(self, prepared: Padded, activations: Nvfp4Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Alpha goes in as the tensor scale of the weight."""
        from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

        half = prepared.codes.shape[1]
        assert prepared.scale is not None
        codes = pad_bytes(activations.packed, activations.packed.shape[0], half)
        scale = kernel_scales(activations.scale, half // 8, poison=prepared.poison)
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        tensor_scale = torch.tensor(alpha, dtype=torch.float32, device=codes.device)
        result = scaled_mm(
            codes.view(torch.float4_e2m1fn_x2),
            prepared.codes.view(torch.float4_e2m1fn_x2).t(),
            [scale.flatten(), torch.ones_like(tensor_scale)],
            recipe,
            [prepared.scale.flatten(), tensor_scale],
            recipe,
            order,
            order,
            bias=prepared.bias,
            output_dtype=torch.bfloat16,
        )
        return deliver(result, prepared.features, out)


@functools.cache
def _refusal_fp8(device: torch.device) -> str | None:
    codes = torch.zeros(32, 32, device=device).to(torch.float8_e4m3fn)
    backend = TorchFp8()
    weight, activations = Fp8Weight(codes, 1.0), Fp8Activations(codes, 1.0)
    return refusal(lambda: backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, None))


@functools.cache
def _refusal_nvfp4(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    packed = torch.zeros(128, 64, dtype=torch.uint8, device=device)
    scale = torch.ones(128, 8, device=device).to(torch.float8_e4m3fn)
    backend = TorchNvfp4()
    weight, activations = Nvfp4Weight(packed, scale, 1.0), Nvfp4Activations(packed, scale, 1.0)
    return refusal(lambda: backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, None))


def refusal(call: Callable[[], Tensor]) -> str | None:
    """The first line of what a call raises, or None if its result arrives and is finite."""
    try:
        finite = bool(call().isfinite().all())
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:  # NotImplementedError too
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return line.split(" when calling ")[0]  # cuBLAS: a whole call in C++ follows
    return None if finite else "its result is not finite"
