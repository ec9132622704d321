"""What a target's names fuse, and whether that is exact: from headers and scales of four bytes each. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.form import Canonical, Form, ReadBytes, grouped
from modelopt_convert.families.family import Family
from modelopt_convert.run.errors import InputError

_SHOWN = 3
_SHARED = ("weight_scale_2", "input_scale")
"""Scales that a fused module has one of; of FP8 also ``weight_scale``, unless there is one a row."""


@dataclass(frozen=True, slots=True)
class Unequal:
    """A fused module that its members do not allow.

    Attributes:
        native: The fused module, in the target's naming.
        members: Its members, by diffusers' names.
        why: In words.
    """

    native: str
    members: tuple[str, ...]
    why: str


def fused_groups(described: Canonical, family: Family, form: Form) -> dict[str, tuple[str, ...]]:
    """Modules that a form's naming fuses, with their members by diffusers' names; only where one is quantized."""
    if form.naming == "diffusers":
        return {}
    natives = {place[0] for name in described.modules if (place := family.native(name, form.naming)) is not None}
    groups = {native: family.fused(native) for native in sorted(natives)}
    return {native: members for native, members in groups.items() if len(members) > 1}


def unequal_groups(described: Canonical, groups: Mapping[str, tuple[str, ...]], read: ReadBytes) -> list[Unequal]:
    """Groups that cannot be one module exactly."""
    by_module = grouped(described.tensors.values())
    found: list[Unequal] = []
    for native, members in groups.items():
        packed = [name for name in members if name in described.modules]
        if len(packed) < len(members):
            missing = next(name for name in members if name not in described.modules)
            found.append(Unequal(native, members, f"{missing} is not quantized, {packed[0]} is"))
            continue
        if len({described.modules[name].algorithm for name in members}) > 1:
            found.append(Unequal(native, members, "its members have several formats"))
            continue
        for role in ("weight_scale", *_SHARED):
            infos = [by_module[name].get(role) for name in members]
            values = {_value(info, read) for info in infos if info is None or not info.shape}
            if len(values) > 1:
                found.append(Unequal(native, members, f"its members have several values of {role}"))
                break
    return found


def refuse_unequal(found: list[Unequal], target: str, where: str) -> None:
    """Refuse what is not exact.

    Raises:
        InputError: ``convert.inexact``.
    """
    if not found:
        return
    shown = "; ".join(f"{one.native}: {one.why}" for one in found[:_SHOWN])
    raise InputError(
        f"{where}: {len(found)} fused modules of {target} cannot be written exactly: {shown}",
        code="convert.inexact",
        path=where,
        hint="--inexact bf16 writes these in BF16, --inexact rebase brings their scales to one, and --inexact "
        "requantize quantizes them again from --base; --dry-run tells what each costs",
    )


def _value(info: TensorInfo | None, read: ReadBytes) -> bytes | None:
    return read(info, 0, info.num_bytes) if info is not None else None
