"""GPTQ's columns by one kernel of Triton for a panel, to the bits of ``gptq.round_panel``.

Plain torch starts a dozen kernels for each column. Every step here is one rounding of float64 or float32: products of
codes with factors, and of errors with what is taken back, have no more digits than float64 holds, so that it is the
same whether the compiler contracts them with the next subtraction. Imports triton: import it inside functions.
"""

import triton
import triton.language as tl
from torch import Tensor

from modelopt_convert.formats.nvfp4.gptq import MOST_ERROR

_ROWS = 32  # of a weight, a program
_WARPS = 4


@triton.jit
def _round(
    wanted_ptr, within_ptr, factors_ptr, step_ptr, errors_ptr, codes_ptr, width, rows,
    MOST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    places = column[:, None] * rows + row[None, :]
    panel = tl.load(wanted_ptr + places, mask=(column < width)[:, None] & inside[None, :], other=0.0)
    step = tl.load(step_ptr + row, mask=inside, other=1.0)
    for here in range(0, width):
        value = tl.sum(tl.where((column == here)[:, None], panel, 0.0), axis=0)
        factor = tl.load(factors_ptr + (here // 16) * rows + row, mask=inside, other=1.0)
        scaled = (value / factor).to(tl.float32)
        size = tl.abs(scaled)
        code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
        code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        code += (size > 5.0).to(tl.int32)
        code = tl.where(scaled == scaled, code, 7)
        small = code.to(tl.float64) * 0.5
        magnitude = tl.where(code < 5, small, tl.where(code == 5, 3.0, tl.where(code == 6, 4.0, 6.0)))
        decoded = tl.where(scaled < 0.0, -magnitude, magnitude)
        error = (value - decoded * factor) / step
        error = tl.minimum(tl.maximum(error, -MOST), MOST)
        error = (error + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: no bit is left for less than one
        there = here * rows + row
        tl.store(codes_ptr + there, (code + tl.where(scaled < 0.0, 8, 0)).to(tl.uint8), mask=inside)
        tl.store(errors_ptr + there, error, mask=inside)
        taken = tl.load(within_ptr + here * width + column, mask=(column > here) & (column < width), other=0.0)
        panel -= taken[:, None] * (error * step)[None, :]


def round_panel(wanted: Tensor, within: Tensor, factors: Tensor, step: Tensor, errors: Tensor, codes: Tensor) -> None:
    """As ``gptq.round_panel``; ``wanted`` is left as it was."""
    width, rows = wanted.shape
    grid = (triton.cdiv(rows, _ROWS),)
    sizes = {"MOST": MOST_ERROR, "WIDTH": triton.next_power_of_2(width), "ROWS": _ROWS}
    _round[grid](wanted, within, factors, step, errors, codes, width, rows, **sizes, num_warps=_WARPS)


def compile_ahead(capability: int) -> str:
    """PTX of the kernel for a compute capability such as 90, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("wanted_ptr", "within_ptr", "factors_ptr", "step_ptr", "errors_ptr"), "*fp64")
    signature = pointers | {"codes_ptr": "*u8", "width": "i32", "rows": "i32"}
    constants = {"MOST": MOST_ERROR, "WIDTH": 128, "ROWS": _ROWS}
    source = ASTSource(_round, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
    return str(compiled.asm["ptx"])
