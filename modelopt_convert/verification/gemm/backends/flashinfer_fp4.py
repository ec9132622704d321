"""flashinfer's ``mm_fp4`` with the operands of each of its kernels prepared as SGLang 0.5.23 prepares them.

Followed line by line: ``ModelOptFp4LinearMethod`` in multimodal_gen/runtime/layers/quantization/modelopt_quant.py and
``pad_nvfp4_weight`` in srt/layers/quantization/modelopt_quant.py. flashinfer's quantizers are never called: below
compute capability 10.0 they are empty kernels that return whatever was in memory.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.scales import unswizzle_128x4
from modelopt_convert.formats.nvfp4.shapes import COLUMN_TILE, round_up
from modelopt_convert.verification.gemm.backends.base import Kind
from modelopt_convert.verification.gemm.backends.padding import kernel_scales, pad_bytes
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Activations, Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Activations, Weight

_AUTO = ("cudnn", "cutlass", "b12x")  # what "auto" may resolve to; trtllm's operands differ, so never that
_EPILOGUE_TILE = 128  # of trtllm's kernels: their weight's rows are shuffled within blocks of 32
_ALIGNMENT = 32  # of N and K for all others: FP4_GEMM_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Prepared:
    """A weight as ``mm_fp4`` takes it, before ``.T``. N' and K' are N and K with padding.

    Attributes:
        packed: uint8 [N', K'/2]; rows shuffled for trtllm.
        scale: float8_e4m3fn, ``padded_shape(N', K'/16)``, in the 128x4 order; rows shuffled first for trtllm.
        num_rows: N.
        bias: [N] or None.
        poison: Whether padding of the scales is NaN.
    """

    packed: Tensor
    scale: Tensor
    num_rows: int
    bias: Tensor | None
    poison: bool


class FlashinferFp4:
    """``mm_fp4(backend=...)``."""

    kind: Kind = "native"
    formats: frozenset[Algorithm] = frozenset({"nvfp4"})

    def __init__(self, gemm: str) -> None:
        """Take the kernel's name as ``mm_fp4`` does."""
        self.name = f"flashinfer-{gemm}"
        self._gemm = gemm

    def unavailable(self, device: torch.device) -> str | None:
        """Why not, found by a small call that goes through flashinfer's own checks and builds or fetches the kernel."""
        # Asked first: the import takes seconds and makes a folder in the user's cache.
        capability = self._capability(device)
        if capability is None:
            return "needs a CUDA device"
        try:
            mm_fp4 = self._library().mm_fp4
        except ModuleNotFoundError as error:
            if error.name == "flashinfer":
                return "flashinfer is not installed: pip install flashinfer-python"
            return f"flashinfer cannot be imported: {_first_line(error)}"
        except Exception as error:  # a library that does not fit torch or CUDA raises anything
            return f"flashinfer cannot be imported: {_first_line(error)}"
        try:
            # "auto" is not a name that flashinfer answers for.
            names = _AUTO if self._gemm == "auto" else (self._gemm,)
            if not any(mm_fp4.is_backend_supported(name, capability[0] * 10 + capability[1]) for name in names):
                return f"mm_fp4 has no {self._gemm} kernel for compute capability {capability[0]}.{capability[1]}"
            self._try(device)
        except Exception as error:  # requirements, a compiler, a download, the launch: each raises its own
            return f"a small mm_fp4 call fails: {_first_line(error)}"
        return None

    def prepare(self, weight: Weight, *, poison: bool) -> Prepared:
        """Pad, swizzle, and for trtllm shuffle.

        Poison goes into all rows of the scales from N on. A row of scales reaches its own output column only, and those
        from N on are sliced away or never stored. Columns from K/16 on stay zero: kernels multiply them with codes of
        zero, and NaN times zero is NaN.
        """
        assert isinstance(weight, Nvfp4Weight)
        num_rows, num_columns = weight.shape
        if self._gemm == "trtllm":
            rows, columns = round_up(num_rows, _EPILOGUE_TILE), round_up(num_columns, COLUMN_TILE * BLOCK_SIZE)
        else:
            rows, columns = round_up(num_rows, _ALIGNMENT), round_up(num_columns, _ALIGNMENT)
        packed = pad_bytes(weight.packed, rows, columns // 2)
        scale = kernel_scales(weight.scale, columns // BLOCK_SIZE, poison=poison)
        if self._gemm == "trtllm":
            library = self._library()
            packed = library.shuffle_matrix_a(packed, _EPILOGUE_TILE)
            # It takes scales in row-major order, padding included, and returns them shuffled, in 128x4 order and flat.
            linear = unswizzle_128x4(scale, *scale.shape).view(torch.uint8)
            shuffled = library.shuffle_matrix_sf_a(linear, _EPILOGUE_TILE)
            scale = shuffled.reshape(linear.shape).view(torch.float8_e4m3fn)
        return Prepared(packed, scale, num_rows, weight.bias, poison)

    def gemm(self, prepared: Prepared, activations: Activations, alpha: float, out: Tensor | None) -> Tensor:
        """Call with both operands in FP4, then slice the padding of N away and add the bias, as SGLang does."""
        assert isinstance(activations, Nvfp4Activations)
        rows, num_bytes = prepared.packed.shape
        packed = pad_bytes(activations.packed, activations.packed.shape[0], num_bytes)
        scale = kernel_scales(activations.scale, num_bytes * 2 // BLOCK_SIZE, poison=prepared.poison)
        if out is not None and rows != prepared.num_rows:
            # The kernel writes padded columns as well.
            out = torch.full((packed.shape[0], rows), torch.nan, dtype=torch.bfloat16, device=packed.device)
        result: Tensor = self._library().mm_fp4(
            packed,
            prepared.packed.T,
            scale,
            prepared.scale.T,
            torch.tensor(alpha, dtype=torch.float32, device=packed.device),
            torch.bfloat16,
            out=out,
            backend=self._gemm,
        )
        result = result[:, : prepared.num_rows].contiguous()
        return result if prepared.bias is None else result + prepared.bias.to(result.dtype)

    def _library(self) -> Any:
        # Untyped, and not there on most machines.
        return importlib.import_module("flashinfer")

    def _capability(self, device: torch.device) -> tuple[int, int] | None:
        if device.type != "cuda" or not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_capability(device)

    def _try(self, device: torch.device) -> None:
        # Codes of 1.0, scales of 1.0; whether the numbers are right is the self-test's question.
        codes = torch.full((128, 64), 0x22, dtype=torch.uint8, device=device)
        scale = torch.ones(128, 8, device=device).to(torch.float8_e4m3fn)
        prepared = self.prepare(Nvfp4Weight(codes, scale, 1.0), poison=False)
        self.gemm(prepared, Nvfp4Activations(codes[:16].contiguous(), scale[:16].contiguous(), 1.0), 1.0, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
