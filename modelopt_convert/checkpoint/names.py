"""Names of tensors, of the modules that they belong to, and of files in messages. Pure."""

import re


def module_of(tensor: str) -> str:
    """The module of a tensor: the tensor's name without the last part; empty for a parameter of the model itself."""
    return tensor.rpartition(".")[0]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,9})", name)]


def inside(where: str, name: str) -> str:
    """A file of a checkpoint, for messages: the checkpoint itself, where that is one file.

    Args:
        where: The folder or the .safetensors file that was opened.
        name: Of a file in the folder; what a config.json says may stand in the header of the one file.
    """
    return where if where.endswith(".safetensors") else f"{where}/{name}"
