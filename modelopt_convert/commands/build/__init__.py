"""``build-nvfp4`` and ``convert-fp8``, which are one command with two formats.

Each module is a step, and returns what it found. What rewrites need too lies in the folder above.
"""
