"""Pure functions on tensors: no paths, no config, no logging; no argument is ever changed.

Shapes: N rows (output features), K columns (input features), blocks of 16 columns.
"""
