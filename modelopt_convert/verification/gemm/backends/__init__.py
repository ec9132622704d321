"""The backends, best first: what a serving engine would run, then what emulates it, then the referee.

A new one is a file beside this, a line here and its name in names.py; whether it runs is found out by calling it. One
name may stand for several, each for another format or GPU.
"""

from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.backends.bf16 import Bf16
from modelopt_convert.verification.gemm.backends.flashinfer_fp4 import FlashinferFp4
from modelopt_convert.verification.gemm.backends.reference import Reference
from modelopt_convert.verification.gemm.backends.sgl_kernel import SglFp8, SglNvfp4
from modelopt_convert.verification.gemm.backends.torch_scaled import TorchFp8, TorchNvfp4
from modelopt_convert.verification.gemm.backends.triton_gemm import TritonDecode, TritonNative

BACKENDS: tuple[Backend, ...] = (
    *(FlashinferFp4(gemm) for gemm in ("trtllm", "cutlass", "cudnn", "b12x", "auto")),
    SglFp8(),
    SglNvfp4(),
    TorchFp8(),
    TorchNvfp4(),
    TritonNative(),
    TritonDecode(),
    Bf16(),
    Reference(),
)
