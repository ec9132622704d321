"""What a target's names fuse, and whether that is exact: from headers and scales of four bytes each. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.form import Canonical, Form, Naming, ReadBytes, grouped
from modelopt_convert.families.family import Family
from modelopt_convert.run.errors import InputError

Inexact = Literal["refuse", "bf16", "rebase", "requantize"]
_SHOWN = 3
_SHARED = ("weight_scale", "weight_scale_2", "input_scale")
"""Scales that a fused module has one of; ``weight_scale`` where it is one number."""


@dataclass(frozen=True, slots=True)
class Unequal:
    """A fused module that cannot be written exactly, because its members differ.

    Attributes:
        native: The fused module, in the target's naming.
        members: Its members, by diffusers' names.
        why: In words.
        rebases: Whether mopt can bring the scales of the members to one value.
        requantizes: Whether mopt can quantize to their format.
    """

    native: str
    members: tuple[str, ...]
    why: str
    rebases: bool
    requantizes: bool = True


def refuse_without_map(family: Family, target: Form, naming: Naming, where: str) -> None:
    """Refuse to write a model's own names where these are not known.

    Raises:
        InputError: ``convert.family``.
    """
    if naming != "diffusers" and not family.rows:
        raise InputError(
            f"{where}: {target.name} has the model's own names, and mopt has no key map of {family.title}",
            code="convert.family",
            path=where,
            hint="modelopt, torchao, compressed-tensors and bf16 keep diffusers' names",
        )


def fused_groups(described: Canonical, family: Family, naming: Naming) -> dict[str, tuple[str, ...]]:
    """Modules that a naming fuses, with their members by diffusers' names; only where one is quantized."""
    if naming == "diffusers":
        return {}
    natives = {place[0] for name in described.modules if (place := family.native(name, naming)) is not None}
    groups = {native: family.fused(native) for native in sorted(natives)}
    return {native: members for native, members in groups.items() if len(members) > 1}


def unequal_groups(described: Canonical, groups: Mapping[str, tuple[str, ...]], read: ReadBytes) -> list[Unequal]:
    """Groups that cannot be one module exactly."""
    by_module = grouped(described.tensors.values())
    found = (_unequal(described, native, members, by_module, read) for native, members in groups.items())
    return [one for one in found if one is not None]


def _unequal(
    described: Canonical,
    native: str,
    members: tuple[str, ...],
    by_module: Mapping[str, Mapping[str, TensorInfo]],
    read: ReadBytes,
) -> Unequal | None:
    packed = [name for name in members if name in described.modules]
    formats = {described.modules[name].algorithm for name in packed}
    makes = formats <= {"nvfp4", "fp8"}
    if len(packed) < len(members):
        missing = next(name for name in members if name not in described.modules)
        return Unequal(native, members, f"{missing} is not quantized, {packed[0]} is", False, makes)
    if len(formats) > 1:
        return Unequal(native, members, "its members have several formats", False, makes)
    differing: list[str] = []
    for role in _SHARED:
        infos = [by_module[name].get(role) for name in members]
        ranks = {len(info.shape) for info in infos if info is not None}
        if len(ranks) > 1:
            return Unequal(native, members, f"some of its members have one {role}, some one a row", False, makes)
        if ranks <= {0} and len({_value(info, read) for info in infos}) > 1:
            differing.append(role)
    if not differing:
        return None
    return Unequal(native, members, f"its members have several values of {' and '.join(differing)}", makes, makes)


def refuse_unequal(found: list[Unequal], choice: Inexact, target: str, where: str, *, has_base: bool) -> None:
    """Refuse what is not exact, unless the choice says what becomes of it.

    Raises:
        InputError: ``convert.inexact``.
    """
    has_none = choice == "requantize" and not has_base
    told = [one for one in found if has_none or not _settles(one, choice)]
    if not told:
        return
    shown = "; ".join(f"{one.native}: {one.why}" for one in told[:_SHOWN])
    many = "1 fused module" if len(told) == 1 else f"{len(told)} fused modules"
    how = {"rebase": "by bringing scales to one", "requantize": "by quantizing again"}.get(choice, "exactly")
    how += ", as there is no --base" if has_none else ""
    rebase = ", --inexact rebase brings their scales to one" if all(one.rebases for one in found) else ""
    fault = InputError(
        f"{where}: {many} of {target} cannot be written {how}: {shown}",
        code="convert.inexact",
        path=where,
        hint=f"--inexact bf16 writes these in BF16{rebase}, and --inexact requantize quantizes them again from "
        "--base; --dry-run tells what each costs",
    )
    raise fault.at(one.native for one in told)


def _settles(one: Unequal, choice: Inexact) -> bool:
    return {"refuse": False, "bf16": True, "rebase": one.rebases, "requantize": one.requantizes}[choice]


def _value(info: TensorInfo | None, read: ReadBytes) -> bytes | None:
    return read(info, 0, info.num_bytes) if info is not None else None
