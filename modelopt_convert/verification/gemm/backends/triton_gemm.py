"""One Triton kernel that reads the packed bytes and the row-major scales as they are stored, inside the GEMM.

On Blackwell it hands them to the tensor cores (``tl.dot_scaled``), elsewhere it decodes them to half precision first,
exactly. Both go under the name ``triton``; at most one is available on a GPU.
"""

import functools
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import epilogue, strided_scales
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Activations, Nvfp4Weight

# Where Triton has the instruction. Elsewhere (8.9, 9.0, 12.1) its refusal is an assertion that can end the process.
NATIVE_CAPABILITIES = frozenset({100, 103, 120})


@dataclass(frozen=True, slots=True)
class _Prepared:
    weight: Nvfp4Weight
    scale: Tensor  # uint8 [>= N, K/16 + 4]
    poison: bool


class _Triton:
    name = "triton"
    kind: Kind
    formats: frozenset[Algorithm] = frozenset({"nvfp4"})

    def prepare(self, weight: Nvfp4Weight, *, poison: bool) -> _Prepared:
        """Codes stay as they are; scales move to a buffer with a margin."""
        return _Prepared(weight, strided_scales(weight.scale, poison=poison), poison)

    def gemm(self, prepared: _Prepared, activations: Nvfp4Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Float32 accumulators from the kernel; alpha and bias in float64; one rounding."""
        import triton

        from modelopt_convert.verification.gemm.backends.triton_kernels import BLOCKS, NUM_WARPS, nvfp4_gemm

        weight, packed = prepared.weight, activations.packed.contiguous()
        (features, columns), rows = weight.shape, packed.shape[0]
        scale = strided_scales(activations.scale, poison=prepared.poison)
        accumulators = torch.full((rows, features), torch.nan, device=packed.device)
        grid = triton.cdiv(rows, BLOCKS["BLOCK_M"]), triton.cdiv(features, BLOCKS["BLOCK_N"])
        with torch.cuda.device(packed.device if packed.is_cuda else -1):
            nvfp4_gemm[grid](
                packed,
                scale,
                weight.packed.contiguous(),
                prepared.scale,
                accumulators,
                rows,
                features,
                K=columns,
                NATIVE=self.kind == "native",
                num_warps=NUM_WARPS,
                **BLOCKS,
            )
        return epilogue(accumulators, alpha, weight.bias, out)


class TritonNative(_Triton):
    """``tl.dot_scaled``, on Blackwell."""

    kind: Kind = "native"

    def unavailable(self, device: torch.device) -> str | None:
        """By compute capability, then by compiling for it in another process."""
        if device.type != "cuda":
            return "needs a CUDA GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major * 10 + minor not in NATIVE_CAPABILITIES:
            return f"Triton has no NVFP4 instruction for compute capability {major}.{minor}"
        return refusal(major * 10 + minor)


class TritonDecode(_Triton):
    """Decodes inside the kernel: where there is no NVFP4 instruction, and in Triton's interpreter on the CPU."""

    kind: Kind = "emulated"

    def unavailable(self, device: torch.device) -> str | None:
        """Where ``TritonNative`` runs, it takes the name."""
        try:
            from triton import knobs
        except ImportError:
            return "triton is not installed"
        if device.type != "cuda":
            return None if knobs.runtime.interpret else "needs a CUDA GPU"
        return "the native path runs here" if TritonNative().unavailable(device) is None else None


@functools.cache
def refusal(capability: int) -> str | None:
    """Why Triton does not compile the native path for a compute capability such as 100, or None. Survives its abort."""
    command = [sys.executable, "-m", "modelopt_convert.verification.gemm.backends.triton_kernels", str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines()
    return f"Triton does not compile it ({lines[-1] if lines else f'exit status {run.returncode}'})"
