"""Names of the backends, for the command line: known without importing any. No torch."""

NAMES = (
    "flashinfer-trtllm",
    "flashinfer-cutlass",
    "flashinfer-cudnn",
    "flashinfer-b12x",
    "flashinfer-auto",
    "sgl-kernel",
    "torch",
    "triton",
    "bf16",
    "reference",
)
# What SGLang calls them, in the variable of this name and in its own code (runtime/platforms/cuda.py).
SGLANG_VARIABLE = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
ALIASES = {
    "flashinfer_trtllm": "flashinfer-trtllm",
    "flashinfer_cutlass": "flashinfer-cutlass",
    "flashinfer_cudnn": "flashinfer-cudnn",
    "trtllm": "flashinfer-trtllm",
    "cutlass": "flashinfer-cutlass",
    "cudnn": "flashinfer-cudnn",
    "auto": "flashinfer-auto",
}
