"""A description under diffusers' names, and under the model's own. Pure, no torch."""

import math
from dataclasses import replace

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import inside
from modelopt_convert.checkpoint.recipe import halves_swapped, joined_rows, renamed, rows_of
from modelopt_convert.dialects.form import ROW_ROLES, Canonical, Naming, Quantized, grouped, wrong
from modelopt_convert.families.family import Family, Member
from modelopt_convert.families.table import Found, left_out
from modelopt_convert.run.errors import Faults, InputError

_AGAIN = "get the file again from its publisher"


def under_diffusers_names(described: Canonical, found: Found, where: str) -> Canonical:
    """Split what native names fuse, rename the rest, and leave out what is not the transformer.

    Args:
        described: Under native names.
        found: Which family and naming it is in, and the prefix of the names.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``naming.unknown``: a tensor that the family does not have; ``naming.twice``: two for one name.
    """
    family, tensors, modules, fates = (
        found.family,
        dict[str, TensorInfo](),
        dict[str, Quantized](),
        dict(described.fates),
    )
    faults = Faults()
    for full, roles in grouped(described.tensors.values()).items():
        with faults.taken(full):
            native, quantized = full.removeprefix(found.prefix), described.modules.get(full)
            weight = roles.get("weight")
            rows, columns = (quantized.rows, quantized.columns) if quantized is not None else _size(weight)
            members = _members(family, native, rows, columns, where) if rows and found.spelling != "diffusers" else None
            for role, info in roles.items():
                what = left_out(info.name, found)
                if what is not None:
                    fates[info.name] = f"left out: {what}"
                    continue
                names = _diffusers(info.name, found)
                if not names:
                    raise _unknown(info, found, where)
                made = [renamed(info, name) for name in names]
                if role == "weight_scale" and len(names) > 1 and info.shape == (len(names),) and info.shape != (rows,):
                    made = [replace(rows_of(info, name, which, 1), shape=()) for which, name in enumerate(names)]
                elif members is not None and _by_row(info, role):
                    if info.shape[0] != rows:
                        raise wrong(where, info, f"{rows} rows, as the weight has", code="dialect.shape", hint=_AGAIN)
                    made = [
                        rows_of(one, one.name, part.first, part.rows) for one, part in zip(made, members, strict=True)
                    ]
                    made = [halves_swapped(one, one.name) for one in made] if family.swapped(native) else made
                for one in made:
                    if one.name in tensors:
                        raise _twice(one, info, where)
                    tensors[one.name] = one
                fates.setdefault(info.name, f"read as {', '.join(names)}")
            if quantized is not None and found.spelling == "diffusers":
                modules[native] = quantized
            elif quantized is not None and members is not None:
                modules |= {one.module: Quantized(quantized.algorithm, one.rows, columns) for one in members}
    faults.refuse()
    return replace(described, tensors=tensors, modules=modules, fates=fates)


def under_native_names(described: Canonical, family: Family, spelling: Naming, prefix: str) -> Canonical:
    """Fuse what native names fuse, and rename the rest. Members of a fused module have equal scales by now.

    Args:
        described: Under diffusers' names.
        family: Of the model.
        spelling: Which native names.
        prefix: That all get.

    Raises:
        InputError: ``naming.unknown``: a tensor that the family does not have, or a part of a fused module is missing.
    """
    placed: dict[str, dict[int, TensorInfo]] = {}
    faults = Faults()
    for name, info in described.tensors.items():
        place = family.native_tensor(name, spelling)
        if place is None:
            fault = InputError(
                f"tensor {name!r}: no tensor of {family.title} has this name",
                code="naming.unknown",
                hint="the checkpoint is of another model, or has tensors beside the model's",
            )
            faults.add(name, fault)
            continue
        placed.setdefault(place[0], {})[place[1]] = info
    tensors: dict[str, TensorInfo] = {}
    for name, members in placed.items():
        with faults.taken(name):
            module, _, role = name.rpartition(".")
            wanted = len(family.tensor(name) or ())
            parts = [members[number] for number in sorted(members)]
            if len(parts) != wanted:
                raise InputError(
                    f"{name!r} is made of {wanted} tensors, found {len(parts)} ({parts[0].name!r} first)",
                    code="naming.partial",
                    hint="the checkpoint is not whole",
                )
            full = f"{prefix}{name}"
            by_row = _by_row(parts[0], role)
            one = joined_rows(full, parts) if by_row else renamed(parts[0], full)
            tensors[full] = halves_swapped(one, full) if by_row and family.swapped(module) else one
    faults.refuse()
    modules: dict[str, Quantized] = {}
    for name, quantized in described.modules.items():
        home = family.native(name, spelling)
        assert home is not None  # its weight has a native name
        full = f"{prefix}{home[0]}"
        rows = quantized.rows + (modules[full].rows if full in modules else 0)
        modules[full] = replace(quantized, rows=rows)
    return replace(described, tensors=tensors, modules=modules)


def _members(family: Family, native: str, rows: int, columns: int, where: str) -> tuple[Member, ...] | None:
    try:
        return family.members(native, rows, columns)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", code=error.code, path=where, hint=error.hint) from error


def _diffusers(name: str, found: Found) -> tuple[str, ...]:
    """The names that diffusers has for a tensor; none for one that the family does not have."""
    if not name.startswith(found.prefix):
        return ()
    bare = name.removeprefix(found.prefix)
    return (bare,) if found.spelling == "diffusers" else found.family.tensor(bare) or ()


def _by_row(info: TensorInfo, role: str) -> bool:
    return role in ROW_ROLES and bool(info.shape)


def _size(weight: TensorInfo | None) -> tuple[int, int]:
    """Rows and columns of a weight as it is multiplied; nothing of a norm, which is never cut."""
    return (0, 0) if weight is None or len(weight.shape) < 2 else (weight.shape[0], math.prod(weight.shape[1:]))


def _unknown(info: TensorInfo, found: Found, where: str) -> InputError:
    return InputError(
        f"{inside(where, info.file)}: tensor {info.name!r}: no tensor of {found.family.title} has this name",
        code="naming.unknown",
        path=inside(where, info.file),
        hint="get the file again from its publisher; a LoRA has to be merged first",
    )


def _twice(made: TensorInfo, info: TensorInfo, where: str) -> InputError:
    return InputError(
        f"{inside(where, info.file)}: tensor {info.name!r} and another are both {made.name!r} in diffusers' naming",
        code="naming.twice",
        path=inside(where, info.file),
        hint="two checkpoints are mixed in one file; get it again from its publisher",
    )
