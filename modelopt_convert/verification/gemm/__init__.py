"""verification/gemm."""
