"""What becomes of AWQ's and SVDQuant's modules, which few targets have a place for, and how near they are to a base.

No torch before a weight is read. What is quantized again has no input scale: the one of the export is of inputs that
are multiplied by ``pre_quant_scale``, and nothing tells how large they were before.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.checkpoint.recipe import made, recipe_of
from modelopt_convert.commands.convert.inexact import Lossy, Settled, of_base
from modelopt_convert.commands.convert.plan import Inexact, Unequal, fused_groups, unequal_groups
from modelopt_convert.dialects.awq import LOW_RANK, PRE_QUANT_SCALE, folded, transformed_modules
from modelopt_convert.dialects.form import Canonical, Naming, Quantized, ReadBytes, constant, grouped
from modelopt_convert.dialects.packed import TRANSFORM_ROLES
from modelopt_convert.dialects.values import Requantized, cast
from modelopt_convert.families.family import Family
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN = 3
_OF_INPUTS = "it was of inputs multiplied by pre_quant_scale"
_Roles = Mapping[str, Mapping[str, TensorInfo]]


def settle_transformed(
    described: Canonical,
    target: str,
    family: Family,
    spelling: Naming,
    choice: Inexact,
    base: CheckpointReader | None,
    read: ReadBytes,
    where: str,
    *,
    measure: bool,
) -> Settled:
    """Undo what a target has no place for.

    To multiply a weight out is to compute the weight that the stored tensors stand for (``dialects/awq.py``). Weights
    that are not packed become the base's, or are multiplied out. Packed ones keep ``pre_quant_scale`` in ComfyUI's
    files; else they are multiplied out for bf16, and become what the choice says for other targets.

    Args:
        described: Of the source, under diffusers' names.
        target: As ``--to`` says it.
        family: Of the model.
        spelling: The target's names.
        choice: What becomes of packed modules that the target has no place for.
        base: The base, if one is given; its files are beside the source's.
        read: Reads the source, and the base beside.
        where: The source, for messages.
        measure: Whether weights may be read.

    Raises:
        InputError: ``convert.inexact``, ``convert.no_scale`` or ``base.no_counterpart``.
    """
    names = transformed_modules(described)
    if not names:
        return Settled(described, (), {})
    roles = grouped(described.tensors.values())
    told: dict[str, str] = {}
    tensors = dict(described.tensors)
    for name in (one for one in names if one not in described.modules):
        info = _plain(name, roles[name], base, told)
        tensors[info.name] = info
        tensors = _without(tensors, name, TRANSFORM_ROLES)
    packed = [name for name in names if name in described.modules]
    groups = fused_groups(described, family, spelling) if family.rows else {}
    if target == "comfyui":
        packed = _not_carried(packed, roles, groups, unequal_groups(described, groups, read), choice, read)
    now = replace(described, tensors=tensors)
    if not packed:
        return Settled(now, (), told)
    if target == "bf16" or choice == "bf16":
        return _multiplied_out(now, packed, roles, base if target != "bf16" else None, told, read, measure=measure)
    if choice != "requantize":
        raise _refused(packed, roles, target, where)
    sets = _sets(packed, roles, groups, read)
    return _requantized(now, sets, roles, base, told, read, where, measure=measure, is_strict=target != "comfyui")


def prove_near(reader: CheckpointReader, described: Canonical, base: CheckpointReader, limit: float) -> str:
    """Compare every packed and every transformed weight with the base's; in words, how near they are.

    The distance is that of what is quantized, which is the base's weight divided by ``pre_quant_scale``: there the
    limit of plain NVFP4 holds. In the weights themselves AWQ accepts large errors in columns that inputs hardly use.

    Args:
        reader: The source.
        described: Its description, under diffusers' names.
        base: The base; its files are beside the source's.
        limit: The largest relative error (Frobenius) of a module.

    Raises:
        CheckFailedError: ``check.proof``.
        InputError: ``base.no_counterpart``.
    """
    read, roles = reader.read_of, grouped(described.tensors.values())
    names = list(dict.fromkeys([*described.modules, *transformed_modules(described)]))
    errors: dict[str, float] = {}
    for name in names:
        found = folded(roles[name], described.modules.get(name), "F32")
        wanted = cast(of_base(base, name, found.shape), "F32")
        scale = roles[name].get(PRE_QUANT_SCALE)
        factor = _floats(cast(scale, "F32"), 0, scale.shape[0] * 4, read) if scale is not None else None
        errors[name] = _apart(found, wanted, factor, read)
    return near_base(errors, limit, str(reader.path), "AWQ and SVDQuant")


def near_base(errors: Mapping[str, float], limit: float, where: str, what: str) -> str:
    """What is known of modules that cannot be reproduced, in words.

    Args:
        errors: The relative error (Frobenius) of each module against the base.
        limit: The largest that is near.
        where: The checkpoint, for messages.
        what: How the modules are quantized.

    Raises:
        CheckFailedError: ``check.proof``: a module is further from the base.
    """
    far = {name: error for name, error in errors.items() if not error <= limit}
    if far:
        shown = "; ".join(f"{name}: {error:.3g}" for name, error in list(far.items())[:_SHOWN])
        failure = CheckFailedError(
            f"{where}: {len(far)} of {len(errors)} modules are further from the base than {limit:g}: {shown}",
            code="check.proof",
            path=where,
            hint="the checkpoint is damaged, or was made from another base; give that base. Nothing was published",
        )
        raise failure.at(far)
    if not errors:
        return "not proven: nothing is quantized"
    return (
        f"not proven: {what} cannot be reproduced; all {len(errors)} modules are near the base, "
        f"{max(errors.values()):.3g} apart at most"
    )


def _plain(
    name: str, roles: Mapping[str, TensorInfo], base: CheckpointReader | None, told: dict[str, str]
) -> TensorInfo:
    weight = roles["weight"]
    if base is not None:
        told[weight.name] = "the base's own: AWQ or SVDQuant changed it"
        return cast(of_base(base, name, weight.shape), weight.dtype)
    told[weight.name] = f"multiplied out, and rounded to {weight.dtype} once: AWQ or SVDQuant changed it"
    return cast(folded(roles, None, "F32"), weight.dtype)


def _not_carried(
    packed: Iterable[str],
    roles: _Roles,
    groups: Mapping[str, tuple[str, ...]],
    unequal: Iterable[Unequal],
    choice: Inexact,
    read: ReadBytes,
) -> list[str]:
    """Packed modules that cannot keep their factor in a ComfyUI file."""
    found = {name for name in packed if any(role in roles[name] for role in LOW_RANK)}
    changing = {one.native for one in unequal if choice in ("bf16", "requantize")}
    for native, members in groups.items():
        factors = {_all_of(roles[name].get(PRE_QUANT_SCALE), read) for name in members}
        if native in changing or len(factors) > 1 or any(name in found for name in members):
            found.update(members)
    return [name for name in packed if name in found]


def _all_of(info: TensorInfo | None, read: ReadBytes) -> tuple[str, bytes] | None:
    return (info.dtype, read(info, 0, info.num_bytes)) if info is not None else None


def _refused(packed: list[str], roles: _Roles, target: str, where: str) -> InputError:
    low_rank = sum(any(role in roles[name] for role in LOW_RANK) for name in packed)
    what = "SVDQuant's low-rank parts" if low_rank else "AWQ's pre_quant_scale"
    what += ", several in a fused module," if target == "comfyui" and not low_rank else ""
    keeps = "" if low_rank or target == "comfyui" else ", --to comfyui keeps pre_quant_scale"
    fault = InputError(
        f"{where}: {target} has no place for {what} of {len(packed)} modules ({packed[0]} first)",
        code="convert.inexact",
        path=where,
        hint=f"--to bf16 multiplies them out{keeps}, and --inexact requantize makes plain NVFP4 of that, or of --base",
    )
    return fault.at(packed)


def _multiplied_out(
    now: Canonical,
    packed: list[str],
    roles: _Roles,
    base: CheckpointReader | None,
    told: dict[str, str],
    read: ReadBytes,
    *,
    measure: bool,
) -> Settled:
    tensors, lossy = dict(now.tensors), []
    why = "multiplied out and rounded to BF16 once" if base is None else "the values are the base's own"
    for name in packed:
        quantized = now.modules[name]
        weight = (
            folded(roles[name], quantized)
            if base is None
            else cast(of_base(base, name, (quantized.rows, quantized.columns)), "BF16")
        )
        tensors = _without(tensors, name, [*TRANSFORM_ROLES, "weight_scale", "weight_scale_2", "input_scale"])
        tensors[weight.name] = weight
        before = folded(roles[name], quantized, "F32")
        error = _apart(cast(weight, "F32"), before, None, read) if measure else None
        lossy.append(Lossy(name, (name,), "bf16", why, error))
    modules = {name: one for name, one in now.modules.items() if name not in packed}
    return Settled(replace(now, tensors=tensors, modules=modules), tuple(lossy), told)


def _sets(
    packed: list[str], roles: _Roles, groups: Mapping[str, tuple[str, ...]], read: ReadBytes
) -> list[tuple[str, ...]]:
    """Modules that get one scale: what the target fuses, and what has one in the source, as q, k and v have."""
    sets: dict[object, list[str]] = {}
    fused = {name: native for native, members in groups.items() for name in members}
    for name in packed:
        scale = read(roles[name]["weight_scale_2"], 0, 4)
        sets.setdefault(fused.get(name, (name.rpartition(".")[0], scale)), []).append(name)
    return [tuple(one) for one in sets.values()]


def _requantized(
    now: Canonical,
    sets: list[tuple[str, ...]],
    roles: _Roles,
    base: CheckpointReader | None,
    told: dict[str, str],
    read: ReadBytes,
    where: str,
    *,
    measure: bool,
    is_strict: bool,
) -> Settled:
    tensors, lossy = dict(now.tensors), []
    of = "the base" if base is not None else "what the export multiplies by"
    for members in sets:
        weights = {name: _meant(name, roles[name], now.modules[name], base) for name in members}
        factor = _factor(weights.values(), read, where) if measure else 1.0
        for name, weight in weights.items():
            made_of = _packed(name, weight, factor)
            dropped = [*TRANSFORM_ROLES, "input_scale"]
            if "input_scale" in roles[name]:
                told[f"{name}.input_scale"] = f"left out: {_OF_INPUTS}"
            tensors = _without(tensors, name, dropped) | {info.name: info for info in made_of}
            error = None
            if measure:
                before = folded(roles[name], now.modules[name], "F32")
                after = {info.name.rpartition(".")[2]: info for info in made_of}
                error = _apart(folded(after, now.modules[name], "F32"), before, None, read)
            why = f"quantized again from {of}"
            lossy.append(Lossy(name, (name,), "requantized", why, error))
    if is_strict:
        for name in [one for one in tensors if one.endswith(".input_scale")]:
            told[name] = "left out: the target has input scales in all modules or in none"
            del tensors[name]
    return Settled(replace(now, tensors=tensors), tuple(lossy), told)


def _meant(
    name: str, roles: Mapping[str, TensorInfo], quantized: Quantized, base: CheckpointReader | None
) -> TensorInfo:
    if base is not None:
        return of_base(base, name, (quantized.rows, quantized.columns))
    return folded(roles, quantized, "F32")


def _packed(name: str, weight: TensorInfo, factor: float) -> list[TensorInfo]:
    rows, columns = weight.shape
    of = recipe_of(weight)
    codes, scales = (Requantized(of, weight.dtype, part, factor) for part in ("codes", "scales"))
    return [
        made(f"{name}.weight", "U8", (rows, columns // 2), codes, weight.file),
        made(f"{name}.weight_scale", "F8_E4M3", (rows, columns // BLOCK_SIZE), scales, weight.file),
        constant(f"{name}.weight_scale_2", "F32", (), struct.pack("<f", factor), weight.file),
    ]


def _factor(weights: Iterable[TensorInfo], read: ReadBytes, where: str) -> float:
    """The scale of max calibration of several weights together."""
    import numpy as np

    from modelopt_convert.formats.arithmetic import nvfp4_scale_of

    largest = 0.0
    for info in weights:
        wide = cast(info, "F32")
        for begin in range(0, wide.num_bytes, CHUNK_BYTES):
            values = _floats(wide, begin, min(CHUNK_BYTES, wide.num_bytes - begin), read)
            largest = max(largest, float(np.abs(values).max())) if np.isfinite(values).all() else math.inf
    if not 0 < largest < math.inf:
        raise InputError(
            f"{where}: tensor {info.name!r}: expected finite weights, not all zero, found NaN, infinity or zeros alone",
            code="convert.no_scale",
            path=where,
            hint="the export or the base is damaged; get it again, or take --inexact bf16",
        )
    return nvfp4_scale_of(largest)


def _apart(found: TensorInfo, wanted: TensorInfo, factor: "NDArray[np.float32] | None", read: ReadBytes) -> float:
    """Relative Frobenius error of F32 [N, K], each divided by a factor of its columns if there is one."""
    import numpy as np

    columns, error, size = found.shape[1], 0.0, 0.0
    step = max(1, CHUNK_BYTES // (columns * 4)) * columns * 4
    for begin in range(0, found.num_bytes, step):
        count = min(step, found.num_bytes - begin)
        left, right = (_floats(one, begin, count, read).astype(np.float64) for one in (found, wanted))
        if factor is not None:
            left, right = (one.reshape(-1, columns) / factor for one in (left, right))
        error, size = error + float(np.square(left - right).sum()), size + float(np.square(right).sum())
    return math.sqrt(error / size) if size else (math.inf if error else 0.0)


def _floats(info: TensorInfo, begin: int, count: int, read: ReadBytes) -> "NDArray[np.float32]":
    import numpy as np

    return np.frombuffer(read(info, begin, count), np.float32)


def _without(tensors: dict[str, TensorInfo], module: str, roles: Iterable[str]) -> dict[str, TensorInfo]:
    left = {f"{module}.{role}" for role in roles}
    return {name: info for name, info in tensors.items() if name not in left}
