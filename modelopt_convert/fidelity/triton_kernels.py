"""NVFP4 layers by kernels of Triton: the arithmetic of ``activations/nvfp4.py`` and ``emulation.py``, bit for bit.

Plain torch starts thirty kernels a layer, which takes longer than what they do; these are three. Every step is one
rounding of float32 that cannot be contracted with the next: products are powers of two or are rounded before they are
added to. Imports triton: import it inside functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight

_BLOCKS = 64  # of 16 values, a program
_VALUES = 1024  # of an output, a program
_WARPS = 4


@triton.jit
def _to_e4m3(values):
    # Nearest, ties to even, of 0 to 448; NaN stays. By hand, since GPUs before 8.9 do not have the type.
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below the normal values steps are 2^-9; 1.5 * 2^23 steps leave no bit for less than one.
    small = (values + 24576.0) - 24576.0
    rounded = tl.where(values < 0.015625, small, normal)
    return tl.where(values == values, rounded, values)


@triton.jit
def _to_e2m1(values):
    # Nearest, ties to even, up to 6; NaN becomes 0. Steps are 0.5 below 2, 1 below 4, then 2.
    size = tl.abs(values)
    size = tl.where(size == size, tl.minimum(size, 6.0), 0.0)
    inverse = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    code = ((size * inverse + 12582912.0) - 12582912.0) * step
    return tl.where(values < 0.0, -code, code)


@triton.jit
def _quantize(values_ptr, scale_ptr, out_ptr, num_blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (block < num_blocks)[:, None] & (tl.arange(0, 16) < 16)[None, :]
    values = tl.load(values_ptr + places, mask=inside, other=0.0).to(tl.float32)
    ones = tl.full((BLOCKS,), 1.0, tl.float32)
    global_scale = tl.div_rn(ones, ones * tl.load(scale_ptr))
    broken = tl.max((values != values).to(tl.int32), axis=1)  # a maximum leaves NaN out
    largest = tl.where(broken > 0, float("nan"), tl.max(tl.abs(values), axis=1))
    sixth = largest * 0.16666666666666666
    wanted = global_scale * sixth
    scale = _to_e4m3(tl.where(wanted > 448.0, 448.0, wanted))
    factor = tl.div_rn(ones, scale * tl.div_rn(ones, global_scale))
    factor = tl.where(largest == 0.0, 0.0, factor)
    codes = _to_e2m1(values * factor[:, None])
    tl.store(out_ptr + places, (codes * scale[:, None]).to(tl.bfloat16), mask=inside)


@triton.jit
def _decode(packed_ptr, scale_ptr, out_ptr, num_blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < num_blocks)[:, None] & (tl.arange(0, 8) < 8)[None, :]
    packed = tl.load(packed_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside, other=0).to(tl.int32)
    raw = tl.load(scale_ptr + block, mask=block < num_blocks, other=0).to(tl.int32)
    # E4M3 and E2M1 in the upper bits of a half are their values over 2^8 and 2^14, subnormals included.
    bits = ((raw & 0x7F) << 7) | ((raw & 0x80) << 8)
    scale = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    scale = tl.where((raw & 0x7F) == 0x7F, float("nan"), scale)[:, None]
    pair = tl.join(packed & 15, packed >> 4)
    bits = ((pair & 7) << 9) | ((pair & 8) << 12)
    codes = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    values = tl.reshape(codes, (BLOCKS, 16)) * scale
    places = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + places, values.to(tl.bfloat16), mask=(block < num_blocks)[:, None] & (places >= 0))


@triton.jit
def _finish(product_ptr, scale_ptr, bias_ptr, out_ptr, size, columns, BIAS: tl.constexpr, VALUES: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = places < size
    product = tl.load(product_ptr + places, mask=inside, other=0.0)
    rounded = (product * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty)
    if BIAS:
        bias = tl.load(bias_ptr + places % columns, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
        rounded = (rounded.to(tl.float32) + bias.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, rounded, mask=inside)


def quantize(values: Tensor, input_scale: Tensor) -> Tensor:
    """Activations, as ``quantizer_of("nvfp4").static`` makes its operand.

    Args:
        values: [M, K], any float dtype, contiguous; K a multiple of 16.
        input_scale: float32 [], on the same device.

    Returns:
        BF16 [M, K]: codes times block scales.
    """
    operand = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    count = values.numel() // 16
    grid = (triton.cdiv(count, _BLOCKS),)
    _quantize[grid](values, input_scale, operand, count, BLOCKS=_BLOCKS, num_warps=_WARPS)
    return operand


def decode(weight: Nvfp4Weight) -> Tensor:
    """A weight, as ``decode_nvfp4`` has it.

    Returns:
        BF16 [N, K], exact.
    """
    packed, scale = weight.packed.contiguous(), weight.scale.contiguous()
    values = torch.empty(weight.shape, dtype=torch.bfloat16, device=packed.device)
    count = values.numel() // 16
    grid = (triton.cdiv(count, _BLOCKS),)
    _decode[grid](packed, scale.view(torch.uint8), values, count, BLOCKS=_BLOCKS, num_warps=_WARPS)
    return values


def finish(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What follows the GEMM: both scales, rounding, then the bias and rounding again.

    Args:
        product: float32 [M, N], contiguous.
        scale: float32 [], ``input_scale * weight_scale_2``.
        bias: [N] or None.
        dtype: Of the result.

    Returns:
        [M, N].
    """
    output = torch.empty(product.shape, dtype=dtype, device=product.device)
    size, columns, added = product.numel(), product.shape[1], product if bias is None else bias
    grid = (triton.cdiv(size, _VALUES),)
    flags = {"BIAS": bias is not None, "VALUES": _VALUES, "num_warps": _WARPS}
    _finish[grid](product, scale, added, output, size, columns, **flags)
    return output


def compile_ahead(capability: int) -> dict[str, str]:
    """PTX of the kernels for a compute capability such as 90, without a GPU, for BF16 layers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, found = GPUTarget("cuda", capability, 32), {}
    for name, kernel, signature, constants in (
        (
            "quantize",
            _quantize,
            {"values_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*bf16", "num_blocks": "i32"},
            {"BLOCKS": _BLOCKS},
        ),
        (
            "finish",
            _finish,
            {"product_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
            | {"size": "i32", "columns": "i32"},
            {"BIAS": True, "VALUES": _VALUES},
        ),
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        found[name] = str(triton.compile(source, target=target, options={"num_warps": _WARPS}).asm["ptx"])
    return found
