"""Which modules of a model stay in BF16: presets as TOML data, and the globs that they are written in.

A new preset is a file in the folder ``presets`` and needs no Python. What a plan makes of a preset does not belong
here.
"""
