"""Kernel parity: operands, probes, and the GEMM of each backend against the exact product.

What a format needs for that is the module with the format's name. Nothing here knows where a checkpoint lies.
"""
