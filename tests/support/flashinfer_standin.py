"""A strict stand-in for flashinfer 0.7.2's ``mm_fp4``, for tests on machines without a Blackwell GPU.

It reads operands from memory the way the documents of flashinfer, cuBLAS ("1D block scaling factors layout") and
TensorRT-LLM say, with code of its own, and refuses what flashinfer's Python and C++ refuse. Padding that a tile of a
kernel multiplies is multiplied here too. What comes from it is ``simulated``, never ``native``.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from modelopt_convert.verification.gemm.backends.flashinfer_fp4 import FlashinferFp4

# What @supported_compute_capability says in flashinfer/gemm/gemm_base.py.
SUPPORTED = {
    "cudnn": {100, 103, 107, 110, 120, 121},
    "cutlass": {100, 103, 107, 110, 120, 121},
    "trtllm": {100, 103, 107},
    "b12x": {120, 121},
}
_TILE = 64  # columns of K to one tile of scales
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class KernelRefusesError(RuntimeError):
    """What TVM_FFI_ICHECK raises."""


class BackendSupportedError(ValueError):
    pass


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def _memory(tensor: Tensor, size: int) -> Tensor:
    """uint8 [size] from the tensor's pointer on, whatever its strides say; beyond its end, NaN."""
    raw = tensor.view(torch.uint8) if tensor.dtype != torch.uint8 else tensor
    storage = torch.tensor([], dtype=torch.uint8).set_(raw.untyped_storage())[raw.storage_offset() :]
    found = torch.full((size,), 0x7F, dtype=torch.uint8)
    found[: min(size, storage.numel())] = storage[:size]
    return found


def _codes(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """float64 [rows, columns up to a whole tile], zeros beyond: TMA fills with zeros. The low nibble comes first."""
    raw = _memory(tensor, rows * columns // 2).reshape(rows, columns // 2).long()
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float64)
    values = torch.zeros(rows, -(-columns // _TILE) * _TILE, dtype=torch.float64)
    values[:, 0:columns:2] = table[raw % 16]
    values[:, 1:columns:2] = table[raw // 16]
    return values


def scale_offset(row: Tensor, column: Tensor, num_columns: int) -> Tensor:
    """Where the scale of a row and a block lies: tiles of 128 rows and 4 columns, 512 bytes each."""
    tile = (row // 128) * -(-num_columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


def _scales(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """float64 [rows, K up to a whole tile], each scale 16 times, those in the padding of K as they lie in memory."""
    blocks = -(-columns // _TILE) * 4
    memory = _memory(tensor, -(-rows // 128) * 128 * blocks)
    row, column = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    byte = memory[scale_offset(row, column, blocks)].long()
    exponent, mantissa = byte // 8 % 16, (byte % 8).double()
    value = torch.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7).double())
    return torch.where(byte % 128 == 127, torch.nan, value).repeat_interleave(16, dim=1)


def _multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, alpha: Tensor, *, shuffled: bool) -> Tensor:
    """float64 [M, N] of [M, K/2] and [N, K/2]."""
    num_rows, outputs, columns = a.shape[0], b.shape[0], a.shape[1] * 2
    weight = _codes(b, outputs, columns) * _scales(b_scale, outputs, columns)
    if shuffled:
        # The epilogue hands row p of each 32 to output (p % 8) * 4 + p // 8: 0, 4, 8, ..., 28, 1, 5, ...
        physical = torch.arange(outputs)
        logical = physical // 32 * 32 + physical % 8 * 4 + physical % 32 // 8
        weight = torch.empty_like(weight).index_copy_(0, logical, weight)
    rows = _codes(a, num_rows, columns) * _scales(a_scale, num_rows, columns)
    return rows @ weight.T * float(alpha)


def _common_kernel_checks(a: Tensor, b: Tensor, alpha: Tensor | None, out: Tensor) -> None:
    _require(alpha is not None, "alpha is not optional in C++", KernelRefusesError)
    _require(b.shape[1] == a.shape[1], "shapes cannot be multiplied", KernelRefusesError)
    _require(tuple(out.shape) == (a.shape[0], b.shape[0]), "out shape mismatch", KernelRefusesError)


def cutlass_kernel(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    workspace: Tensor | None = None,
    tactic: int = -1,
) -> None:
    """``fp4_gemm`` of csrc/fp4_gemm_cutlass.cu. That for 12.x checks less; held to the same here."""
    del workspace, tactic
    _common_kernel_checks(a, b, alpha, out)
    for tensor in (a, b, a_scale, b_scale):
        _require(tensor.is_contiguous(), "must be contiguous", KernelRefusesError)
        _require(tensor.dtype == torch.uint8, "Inconsistency of Tensor type", KernelRefusesError)
    _require(a.shape[1] * 2 % 32 == 0, "Expected k to be divisible by 32", KernelRefusesError)
    _require(b.shape[0] % 32 == 0, "Expected n to be divisible by 32", KernelRefusesError)
    out.copy_(_multiply(a, b, a_scale, b_scale, alpha, shuffled=False))


def trtllm_kernel(
    input_dtype: int,
    output_dtype: int,
    workspace: Tensor | None,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    use_8x4_sf_layout: bool,
    tactic: int = -1,
) -> None:
    """``trtllm_gemm`` of csrc/trtllm_gemm_runner.cu. N and K are held to what SGLang pads to: cubins tell no more."""
    del input_dtype, output_dtype, workspace, tactic
    _common_kernel_checks(a, b, alpha, out)
    for tensor in (a, b, out, a_scale, b_scale):
        _require(tensor.is_contiguous(), "must be contiguous", KernelRefusesError)
    _require(not use_8x4_sf_layout, "the stand-in knows 128x4 scales only", KernelRefusesError)
    _require(b.shape[0] % 128 == 0 and a.shape[1] * 2 % 64 == 0, "No valid tactic found", KernelRefusesError)
    out.copy_(_multiply(a, b, a_scale, b_scale, alpha, shuffled=True))


def _cudnn_kernel(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, alpha: Tensor | None, out: Tensor) -> None:
    """The graph of ``build_cudnn_gemm_fp4_graph``: dims and strides are those of the tensors that are passed."""
    _common_kernel_checks(a, b.T, alpha, out)
    for rows, scale in ((a.shape[0], a_scale), (b.shape[1], b_scale.T)):
        wanted = -(-rows // 128) * 128, -(-a.shape[1] * 2 // _TILE) * 4
        _require(tuple(scale.shape) == wanted and scale.is_contiguous(), f"scales must be {wanted}", KernelRefusesError)
    _require(b.T.is_contiguous() and a.is_contiguous(), "b must be column-major", KernelRefusesError)
    out.copy_(_multiply(a, b.T, a_scale, b_scale.T, alpha, shuffled=False))


@dataclass
class Standin:
    """What the backend takes from the module ``flashinfer``, at a compute capability.

    Attributes:
        capability: Of the GPU that is not there.
        faults: Of a kernel: ``zeros at 32`` (flashinfer#3398), ``unwritten``, ``rows leak``.
        calls: The backends that multiplied.
    """

    capability: int = 100
    faults: frozenset[str] = frozenset()
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mm_fp4 = _Function(self)

    @staticmethod
    def shuffle_matrix_a(tensor: Tensor, epilogue_tile_m: int) -> Tensor:
        _require(tensor.ndim == 2 and epilogue_tile_m == 128, "written for 128 only")
        _require(tensor.shape[0] % 32 == 0, "rows must be multiples of 32", AssertionError)
        shuffled = torch.empty_like(tensor)
        for row in range(tensor.shape[0]):
            shuffled[row // 32 * 32 + row % 4 * 8 + row % 32 // 4] = tensor[row]
        return shuffled

    @staticmethod
    def shuffle_matrix_sf_a(tensor: Tensor, epilogue_tile_m: int) -> Tensor:
        """The argument is row-major, the result flat."""
        _require(tensor.dtype == torch.uint8 and tensor.shape[0] % 128 == 0, "uint8, rows of 128", AssertionError)
        rows, columns = tensor.shape
        flat = torch.zeros(rows * -(-columns // 4) * 4, dtype=torch.uint8)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        flat[scale_offset(row, column, columns)] = Standin.shuffle_matrix_a(tensor, epilogue_tile_m)
        return flat


class _Function:
    def __init__(self, standin: Standin) -> None:
        self._standin = standin

    @staticmethod
    def is_backend_supported(backend: str, cc: int | None = None) -> bool:
        return backend in SUPPORTED and (cc is None or cc in SUPPORTED[backend])

    def _choose(self) -> str:
        """``_heuristic_func_mm_fp4`` with CUDA 13 and cuDNN 9.15."""
        first = {100: "cudnn", 107: "cudnn", 110: "cudnn", 103: "cutlass", 120: "b12x", 121: "cudnn"}
        _require(self._standin.capability in first, "No suitable auto backends found", BackendSupportedError)
        return first[self._standin.capability]

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        a_descale: Tensor,
        b_descale: Tensor,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        out: Tensor | None = None,
        block_size: int = 16,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
        use_nvfp4: bool = True,
        enable_pdl: bool = True,
    ) -> Tensor:
        del enable_pdl
        backend = self._choose() if backend == "auto" else backend
        supported = self.is_backend_supported(backend, self._standin.capability)
        _require(supported, f"mm_fp4 does not support backend {backend!r}", BackendSupportedError)
        # _check_mm_fp4_problem_size
        _require(a.ndim == 2 and b.ndim == 2, "mm_fp4 accepts 2d tensors")
        _require(a.shape[1] == b.shape[0], "K dimension mismatch in mm_fp4")
        _require(a.dtype == b.dtype == torch.uint8, "a and b must have float4_e2m1fn_x2 packed into uint8")
        allowed = (torch.uint8, torch.float8_e4m3fn)
        _require(a_descale.dtype in allowed and b_descale.dtype in allowed, "a_descale and b_descale must be float8")
        _require(alpha is None or (alpha.dtype == torch.float32 and alpha.numel() == 1), "alpha must be a float scalar")
        _require(out_dtype in (torch.bfloat16, torch.float16), "Unsupported output dtype")
        _require(use_nvfp4 and block_size == 16, "nvfp4 only supports block_size = 16")
        _require(not use_8x4_sf_layout or backend == "trtllm", "Only TRTLLM FP4 GEMM supports 8x4 scale factor layout")
        _require(backend != "trtllm" or out_dtype == torch.bfloat16, "Only torch.bfloat16 is supported for TRTLLM")
        _require(backend != "cutlass" or out is None or out.is_contiguous(), "requires a contiguous output tensor")
        _require(backend != "b12x" or a.shape[1] * 2 % 32 == 0, "b12x requires K to be a multiple of 32")
        if out is None:
            out = torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=out_dtype)
        self._standin.calls.append(backend)
        before = out.clone()
        if backend == "trtllm":
            trtllm_kernel(0, 0, None, a, b.T, a_descale, b_descale.T, alpha, out, use_8x4_sf_layout)
        elif backend == "cudnn":
            _cudnn_kernel(a, b, a_descale, b_descale, alpha, out)
        else:
            scales = a_descale.view(torch.uint8), b_descale.view(torch.uint8).T
            cutlass_kernel(a, b.T, *scales, alpha, out)
        self._plant(out, before, a_descale)
        return out

    def _plant(self, out: Tensor, before: Tensor, a_descale: Tensor) -> None:
        faults, num_rows = self._standin.faults, out.shape[0]
        if f"zeros at {num_rows}" in faults:
            out.zero_()
        if "unwritten" in faults:
            out[-1] = before[-1]
        if "rows leak" in faults and num_rows % 128:
            # A scale of the row below the last is added to the last.
            out[-1] += _scales(a_descale, num_rows + 1, a_descale.shape[1] * 16)[-1, 0]


class Simulated(FlashinferFp4):
    """The backend itself, over a stand-in in place of flashinfer. Its kind cannot be set."""

    def __init__(self, gemm: str, library: object | None = None) -> None:
        super().__init__(gemm)
        default = 120 if gemm == "b12x" else 100
        self.library = Standin(default) if library is None else library

    @property
    def kind(self) -> str:
        return "simulated"

    def _library(self) -> object:
        return self.library

    def _capability(self, device: torch.device) -> tuple[int, int] | None:
        return divmod(getattr(self.library, "capability", 100), 10)


def module_of_kernels() -> SimpleNamespace:
    """What flashinfer's ``build_and_load`` returns: the functions that C++ exports, all of them."""
    return SimpleNamespace(
        fp4_gemm=cutlass_kernel,
        fp4_gemm_tactic_num=lambda: 1,
        trtllm_gemm=trtllm_kernel,
        trtllm_gemm_tactics=lambda *_: [0],
    )
