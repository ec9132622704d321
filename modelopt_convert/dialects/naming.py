"""A description under diffusers' names, and under the model's own. Pure, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import halves_swapped, joined_rows, renamed, rows_of
from modelopt_convert.dialects.form import ROW_ROLES, Canonical, Naming, Quantized, grouped
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found
from modelopt_convert.run.errors import InputError


def under_diffusers_names(described: Canonical, found: Found, where: str) -> Canonical:
    """Split what native names fuse, and rename the rest.

    Args:
        described: Under native names.
        found: Which family and naming it is in, and the prefix of the names.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``naming.unknown``: a tensor that the family does not have.
    """
    tensors: dict[str, TensorInfo] = {}
    modules: dict[str, Quantized] = {}
    fates = dict(described.fates)
    for full, roles in grouped(described.tensors.values()).items():
        native = full.removeprefix(found.prefix.rstrip(".")).removeprefix(".") if found.prefix else full
        quantized = described.modules.get(full)
        weight = roles.get("weight")
        rows, columns = (quantized.rows, quantized.columns) if quantized is not None else _size(weight)
        members = found.family.members(native, rows, columns) if weight is not None and weight.shape else None
        for role, info in roles.items():
            if members is None:
                new = found.family.tensor(info.name.removeprefix(found.prefix), found.spelling)
                if new is None:
                    raise _unknown(info, found, where)
                made = [renamed(info, new)]
            else:
                made = [
                    _cut(info, f"{one.module}.{role}", one.first, one.rows, rows, whole=len(members) == 1)
                    for one in members
                ]
                if found.family.swapped(native):
                    made = [halves_swapped(one, one.name) if role in ROW_ROLES else one for one in made]
            tensors |= {one.name: one for one in made}
            fates[info.name] = f"read as {', '.join(one.name for one in made)}"
        if quantized is not None and members is not None:
            modules |= {one.module: Quantized(quantized.algorithm, one.rows, columns) for one in members}
    return replace(described, tensors=tensors, modules=modules, fates=fates)


def under_native_names(described: Canonical, family: Family, spelling: Naming, prefix: str) -> Canonical:
    """Fuse what native names fuse, and rename the rest. Members of a fused module have equal scales by now.

    Args:
        described: Under diffusers' names.
        family: Of the model.
        spelling: Which native names.
        prefix: That all get.
    """
    tensors: dict[str, TensorInfo] = {}
    modules: dict[str, Quantized] = {}
    parts: dict[str, dict[int, str]] = {}
    roles_of = grouped(described.tensors.values())
    for module, roles in roles_of.items():
        place = family.native(module, spelling)
        if place is None:
            for info in roles.values():
                name = f"{prefix}{family.native_tensor(info.name, spelling)}"
                tensors[name] = renamed(info, name)
        else:
            parts.setdefault(place[0], {})[place[1]] = module
    for native, placed in parts.items():
        members = [placed[number] for number in sorted(placed)]
        first = roles_of[members[0]]
        for role, info in first.items():
            leaf = family.native_tensor(info.name, spelling) if len(members) == 1 else f"{native}.{role}"
            name = f"{prefix}{leaf}"
            one = (
                joined_rows(name, [roles_of[member][role] for member in members])
                if _by_row(info, role)
                else renamed(info, name)
            )
            tensors[name] = halves_swapped(one, name) if family.swapped(native) and _by_row(info, role) else one
        quantized = [described.modules[member] for member in members if member in described.modules]
        if quantized:
            rows = sum(one.rows for one in quantized)
            modules[f"{prefix}{native}"] = Quantized(quantized[0].algorithm, rows, quantized[0].columns)
    return replace(described, tensors=tensors, modules=modules)


def _by_row(info: TensorInfo, role: str) -> bool:
    return role in ROW_ROLES and bool(info.shape)


def _size(weight: TensorInfo | None) -> tuple[int, int]:
    if weight is None or not weight.shape:
        return 0, 0
    rows, *rest = weight.shape
    columns = 1
    for size in rest:
        columns *= size
    return rows, columns


def _cut(info: TensorInfo, name: str, first: int, rows: int, of: int, *, whole: bool) -> TensorInfo:
    role = name.rpartition(".")[2]
    if whole or not _by_row(info, role) or info.shape[0] != of:
        return renamed(info, name)
    return rows_of(info, name, first, rows)


def _unknown(info: TensorInfo, found: Found, where: str) -> InputError:
    return InputError(
        f"{where}/{info.file}: tensor {info.name!r}: no tensor of {found.family.name} has this name",
        code="naming.unknown",
        path=f"{where}/{info.file}",
        hint="get the file again from its publisher; a LoRA has to be merged first",
    )
