"""NVFP4: E2M1 codes, two to a byte, under an E4M3 scale per 16 columns and a float32 scale per weight.

Facts and shapes import no torch; codes and scales do. Shapes in docstrings: N rows (output features), K columns
(input features).
"""
