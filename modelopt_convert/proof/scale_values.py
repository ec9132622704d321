"""Scales of one number, and the refusal of those that no kernel could use. No torch."""

import struct

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.run.errors import InputError


def unusable_scale(export: CheckpointReader, module: PackedModule, role: str, expected: str, found: str) -> InputError:
    """The error for a scale that no kernel could use."""
    info = module.scales[role]
    where = str(export.folder / info.file)
    return InputError(
        f"{where}: tensor {info.name!r}: expected {expected}, found {found}",
        code="export.unusable_scale",
        path=where,
        hint=f"the module was all zero or never calibrated; export again, or build with --keep-bf16 '{module.name}'",
    )


def tensor_scale(export: CheckpointReader, module: PackedModule, role: str) -> float:
    """A scale of one number.

    Raises:
        InputError: ``export.unusable_scale``: not finite and positive.
    """
    value = float(struct.unpack("<f", export.read(module.scales[role].name))[0])
    if not 0.0 < value < float("inf"):
        raise unusable_scale(export, module, role, "a finite positive scale", str(value))
    return value
