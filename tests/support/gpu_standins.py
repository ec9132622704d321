"""Stand-ins for GEMMs that need a Blackwell GPU or CUDA: they refuse what the real ones refuse, and compute exactly.

Contracts from sgl-kernel/csrc/gemm/{nvfp4_scaled_mm_kernels,fp8_gemm_kernel}.cu (SGLang) and from
aten/src/ATen/native/cuda/ScaledBlas.cpp (PyTorch). Scales are found by the formula of the 128x4 order, one by one.
"""

from types import ModuleType

import torch
from torch import Tensor


def sgl_kernel(*functions: str) -> ModuleType:
    """The package, with some of its functions."""
    module = ModuleType("sgl_kernel")
    for name in functions:
        setattr(module, name, {"fp8_scaled_mm": fp8_scaled_mm, "cutlass_scaled_fp4_mm": cutlass_scaled_fp4_mm}[name])
    return module


def fp8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    assert mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn and out_dtype in (torch.bfloat16, torch.float16)
    assert mat_a.stride(1) == 1, "mat_a must be a row major tensor"
    assert mat_b.stride(0) == 1, "mat_b must be a column major tensor"
    (rows, columns), features = mat_a.shape, mat_b.shape[1]
    assert columns == mat_b.shape[0] and columns % 16 == 0 and features * 2 % 16 == 0
    assert scales_a.numel() == rows and scales_b.numel() == features
    for scale in (scales_a, scales_b):
        assert scale.is_contiguous() and scale.dtype == torch.float32
    result = mat_a.double() @ mat_b.double() * scales_a.double().view(-1, 1) * scales_b.double().view(1, -1)
    if bias is not None:
        assert bias.numel() == features and bias.is_contiguous() and bias.dtype == out_dtype
        result += bias.double()
    return result.to(out_dtype)


def cutlass_scaled_fp4_mm(
    a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor, out_dtype: torch.dtype
) -> Tensor:
    assert a.dtype == b.dtype == torch.uint8 and a.is_contiguous() and b.is_contiguous()
    assert a.shape[1] == b.shape[1] and a.shape[1] * 2 % 32 == 0 and b.shape[0] % 32 == 0
    assert alpha.dtype == torch.float32 and alpha.numel() == 1
    for operand, scale in ((a, block_scale_a), (b, block_scale_b)):
        assert scale.dtype == torch.float8_e4m3fn and scale.is_contiguous()
        assert tuple(scale.shape) == (-(-operand.shape[0] // 128) * 128, -(-operand.shape[1] // 32) * 4)
    product = _decode(a, block_scale_a) @ _decode(b, block_scale_b).T
    return (product * alpha.double()).to(out_dtype)


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: list[Tensor],
    scale_recipe_a: list[object],
    scale_b: list[Tensor],
    scale_recipe_b: list[object],
    swizzle_a: list[object],
    swizzle_b: list[object],
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``torch.nn.functional.scaled_mm`` with NVFP4 block scales."""
    from torch.nn.functional import ScalingType, SwizzleType

    assert scale_recipe_a == scale_recipe_b == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert swizzle_a == swizzle_b == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    assert mat_a.dtype == mat_b.dtype == torch.float4_e2m1fn_x2 and mat_b.stride(0) == 1
    left, right = mat_a.view(torch.uint8), mat_b.t().view(torch.uint8)
    assert left.shape[1] == right.shape[1] and left.shape[1] * 2 % 32 == 0 and right.shape[0] % 16 == 0
    for operand, scale in ((left, scale_a), (right, scale_b)):
        assert scale[0].numel() == -(-operand.shape[0] // 128) * 128 * -(-operand.shape[1] // 32) * 4
        assert scale[0].dtype == torch.float8_e4m3fn and scale[0].is_contiguous()
        assert scale[1].dtype == torch.float32 and scale[1].numel() == 1
    product = _decode(left, scale_a[0]) @ _decode(right, scale_b[0]).T
    product = product * scale_a[1].double() * scale_b[1].double()
    if bias is not None:
        assert bias.dtype == output_dtype and bias.numel() == right.shape[0]
        product += bias.double()
    return product.to(output_dtype)


def _decode(packed: Tensor, scale: Tensor) -> Tensor:
    """As the hardware: groups of 64 columns, codes past K zero, the scales of the whole group multiplied in."""
    rows, groups = packed.shape[0], -(-packed.shape[1] // 32)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    codes = torch.zeros(rows, groups * 64, dtype=torch.long)
    codes[:, 0 : packed.shape[1] * 2 : 2] = packed.long() & 15
    codes[:, 1 : packed.shape[1] * 2 : 2] = packed.long() >> 4
    decoded = values[codes & 7] * (1 - 2 * (codes >> 3))
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(groups * 4), indexing="ij")
    offset = (row // 128 * groups + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    factors = scale.flatten().double()[offset].repeat_interleave(16, dim=1)
    return decoded * factors
