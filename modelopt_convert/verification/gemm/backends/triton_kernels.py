"""The kernel of the ``triton`` backend, and its compilation for a GPU that is not there.

    python -m modelopt_convert.verify.backends.triton_kernels CAPABILITY

compiles the native path for a compute capability such as 100 and prints the tensor core instruction found. A process of
its own, since Triton refuses some GPUs by an assertion that ends the process. Imports triton: import it inside methods.
"""

import sys
from typing import Any

import triton
import triton.language as tl

# A native instruction takes 128 rows of activations; the rest is what sufficed for compiling on all targets.
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
NUM_WARPS = 8
NATIVE_INSTRUCTION = "mxf4nvf4"


@triton.jit
def _e2m1(codes):
    # E2M1 in the upper bits of a half is the value over 2^14, zero and subnormals included.
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e4m3(codes):
    # The same with 2^8, but for NaN. By hand, since GPUs before 8.9 do not have the type.
    bits = ((codes & 0x7F) << 7) | ((codes & 0x80) << 8)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _columns(packed, scales, ROWS: tl.constexpr, HALF: tl.constexpr):
    # Even and odd columns, each [ROWS, HALF] in half precision, which holds E2M1 times E4M3 exactly.
    wide = _e4m3(scales.to(tl.int32))[:, :, None]
    scale = tl.reshape(tl.broadcast_to(wide, (ROWS, HALF // 8, 8)), (ROWS, HALF))
    codes = packed.to(tl.int32)
    return (_e2m1(codes & 15) * scale).to(tl.float16), (_e2m1(codes >> 4) * scale).to(tl.float16)


@triton.jit(do_not_specialize=["M", "N"])
def nvfp4_gemm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``a @ b.T`` in float32 [M, N], from packed bytes [M, K/2] and [N, K/2] as stored, even columns in low nibbles.

    Scales are bytes of E4M3, row-major with K/16 + 4 a row; nothing past [M, K/16] and [N, K/16] is read.
    """
    half: tl.constexpr = BLOCK_K // 2
    groups: tl.constexpr = BLOCK_K // 16
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    byte = tl.arange(0, half)[None, :]
    group = tl.arange(0, groups)[None, :]
    accumulators = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        byte_k = k // 2 + byte
        group_k = k // 16 + group
        a_in = (rows < M) & (byte_k < K // 2)
        b_in = (features < N) & (byte_k < K // 2)
        a = tl.load(a_ptr + rows.to(tl.int64) * (K // 2) + byte_k, mask=a_in, other=0)
        b = tl.load(b_ptr + features.to(tl.int64) * (K // 2) + byte_k, mask=b_in, other=0)
        a_in = (rows < M) & (group_k < K // 16)
        b_in = (features < N) & (group_k < K // 16)
        a_scale = tl.load(a_scale_ptr + rows.to(tl.int64) * (K // 16 + 4) + group_k, mask=a_in, other=0)
        b_scale = tl.load(b_scale_ptr + features.to(tl.int64) * (K // 16 + 4) + group_k, mask=b_in, other=0)
        if NATIVE:
            accumulators = tl.dot_scaled(
                a,
                a_scale.to(tl.float8e4nv, bitcast=True),
                "e2m1",
                tl.trans(b),
                b_scale.to(tl.float8e4nv, bitcast=True),
                "e2m1",
                accumulators,
            )
        else:
            a_even, a_odd = _columns(a, a_scale, BLOCK_M, half)
            b_even, b_odd = _columns(b, b_scale, BLOCK_N, half)
            accumulators = tl.dot(a_even, tl.trans(b_even), accumulators)
            accumulators = tl.dot(a_odd, tl.trans(b_odd), accumulators)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + rows.to(tl.int64) * N + columns, accumulators, mask=(rows < M) & (columns < N))


def compile_ahead(capability: int, *, native: bool, num_columns: int = 3072) -> str:
    """PTX of the kernel for a compute capability such as 90 or 100, through ptxas, without a GPU.

    Raises:
        Exception: Triton or ptxas refuses; or the process ends.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {"K": num_columns, "NATIVE": native, **BLOCKS}
    signature = {name: "*u8" for name in ("a_ptr", "a_scale_ptr", "b_ptr", "b_scale_ptr")}
    signature |= {"out_ptr": "*fp32", "M": "i32", "N": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(nvfp4_gemm, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    if NATIVE_INSTRUCTION not in compile_ahead(int(sys.argv[1]), native=True):
        sys.exit(f"no {NATIVE_INSTRUCTION} in the PTX")
    print(NATIVE_INSTRUCTION)
