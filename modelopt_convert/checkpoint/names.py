"""Names of tensors and of the modules that they belong to. Pure."""

import re


def module_of(tensor: str) -> str:
    """The module of a tensor: the tensor's name without the last part; empty for a parameter of the model itself."""
    return tensor.rpartition(".")[0]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,9})", name)]
