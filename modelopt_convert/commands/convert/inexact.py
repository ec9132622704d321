"""What becomes of modules that a target cannot hold exactly, and what that costs. No torch before a weight is read.

Weights are made by recipes (``dialects/values.py``) while they are written. Scales are known before that: the scale of
a group that is quantized again is made of the largest magnitude of the base's weights.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.checkpoint.recipe import Elsewhere, made, recipe_of
from modelopt_convert.commands.convert.plan import Inexact, Unequal
from modelopt_convert.dialects.decoded import decoded
from modelopt_convert.dialects.form import Algorithm, Canonical, Quantized, ReadBytes, constant, grouped
from modelopt_convert.dialects.values import Mapped, Requantized, cast, float_of
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import InputError

How = Literal["bf16", "rebased", "requantized"]
BASE = "base"  # the place of the base's files
# Rounding to 8 bits of significand moves a value by 2^-8 of it at most, as long as BF16 has it as a normal number.
BF16_BOUND = 2.0**-8
_LEAST_NORMAL = 2.0**-126
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
# The smallest value but zero, in units of the factor: of code and block scale, or of code.
_LEAST: Mapping[Algorithm, float] = {"nvfp4": 0.5 * 2.0**-9, "fp8": 2.0**-9, "fp8_e5m2": 2.0**-16}


@dataclass(frozen=True, slots=True)
class Lossy:
    """A module whose weight is not the source's.

    Attributes:
        module: In the target's naming.
        members: Its quantized members, by diffusers' names.
        how: What became of it.
        why: In words.
        rel_error: Frobenius norm of the change, divided by that of the weight as the source decodes; None: not known
            yet.
        is_bound: Whether that is the most that it can be, and not measured.
    """

    module: str
    members: tuple[str, ...]
    how: How
    why: str
    rel_error: float | None = None
    is_bound: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """A description that a target can hold exactly.

    Attributes:
        described: The description.
        lossy: What became of modules that it could not hold.
        told: What else changed, in words, by tensor.
    """

    described: Canonical
    lossy: tuple[Lossy, ...]
    told: Mapping[str, str]


def settle(
    described: Canonical,
    found: Iterable[Unequal],
    choice: Inexact,
    base: CheckpointReader | None,
    read: ReadBytes,
    *,
    measure: bool,
) -> Settled:
    """Give every group one format and one of each scale.

    Args:
        described: Of the source, under diffusers' names.
        found: The groups.
        choice: What becomes of these.
        base: The base, for ``requantize`` and the values of ``bf16``; its files are beside the source's.
        read: Reads the source, and the base beside.
        measure: Whether weights may be read: else an error comes from scales, is a bound, or is not known.

    Raises:
        InputError: ``base.no_counterpart`` or ``base.not_finite``.
    """
    lossy: list[Lossy] = []
    told: dict[str, str] = {}
    now = described
    for one in found:
        packed = tuple(name for name in one.members if name in described.modules)
        before, how = now, _how(now, one, choice, read)
        if how == "bf16":
            now = _unpacked(now, one.members, base, read)
        elif how == "requantized":
            now = _requantized(now, one.members, base, read, measure=measure)
        elif how == "rebased":
            now = _rebased(now, one.members, read)
        now = _one_input_scale(now, one.members, told, read)
        if how is not None:
            error, is_bound = _error(before, now, packed, how, base, read, measure=measure)
            own = "; the values are the base's own" if how == "bf16" and base is not None else ""
            lossy.append(Lossy(one.native, packed, how, f"{one.why}{own}", error, is_bound))
    return Settled(now, tuple(lossy), told)


def unpacked(described: Canonical, expected: Canonical, read: ReadBytes) -> list[Lossy]:
    """Quantized modules that a target writes in BF16 by itself, by their own values."""
    lossy: list[Lossy] = []
    by_module = grouped(described.tensors.values())
    for name in sorted(described.modules.keys() - expected.modules.keys()):
        bound = BF16_BOUND if _is_normal(described.modules[name], by_module[name], read) else None
        lossy.append(Lossy(name, (name,), "bf16", "the target is not quantized", bound, bound is not None))
    return lossy


def _how(described: Canonical, one: Unequal, choice: Inexact, read: ReadBytes) -> How | None:
    """What becomes of a group's weights; None where they stay as they are."""
    if choice == "bf16":
        return "bf16"
    if _same_weights(described, one, read):
        return None
    return "requantized" if choice == "requantize" else "rebased"


def _same_weights(described: Canonical, one: Unequal, read: ReadBytes) -> bool:
    """Whether the members of a group differ in their input scales alone."""
    if not one.rebases:
        return False
    roles = [described.of(name) for name in one.members]
    found = [
        tuple(read(mine[role], 0, 4) for role in _SCALES[:2] if role in mine and not mine[role].shape) for mine in roles
    ]
    return len(set(found)) == 1


def _replaced(
    described: Canonical, tensors: Iterable[TensorInfo], modules: Mapping[str, Quantized], without: Iterable[str] = ()
) -> Canonical:
    """A description with other tensors and modules in place of its own, and without some."""
    left = set(without)
    kept = {name: info for name, info in described.tensors.items() if name not in left}
    return replace(described, tensors=kept | {info.name: info for info in tensors}, modules=modules)


def _unpacked(
    described: Canonical, members: tuple[str, ...], base: CheckpointReader | None, read: ReadBytes
) -> Canonical:
    packed = [name for name in members if name in described.modules]
    plain = [described.tensors[f"{name}.weight"].dtype for name in members if name not in packed]
    dtype = plain[0] if plain else "BF16"
    weights: list[TensorInfo] = []
    for name in packed:
        quantized = described.modules[name]
        if base is not None:
            weights.append(cast(of_base(base, name, (quantized.rows, quantized.columns)), dtype))
            continue
        roles = described.of(name)
        weights.append(decoded(quantized, roles) if dtype == "BF16" else cast(decoded(quantized, roles, "F32"), dtype))
    scales = [f"{name}.{role}" for name in packed for role in _SCALES]
    modules = {name: one for name, one in described.modules.items() if name not in packed}
    return _replaced(described, weights, modules, scales)


def _rebased(described: Canonical, members: tuple[str, ...], read: ReadBytes) -> Canonical:
    """Scales of the group brought to the largest; NVFP4's block scales, or FP8's codes, are rounded to E4M3 again."""
    from modelopt_convert.formats.arithmetic import rebased_bytes

    is_nvfp4 = described.modules[members[0]].algorithm == "nvfp4"
    factor, moved = ("weight_scale_2", "weight_scale") if is_nvfp4 else ("weight_scale", "weight")
    factors = {name: float_of(described.tensors[f"{name}.{factor}"], read) for name in members}
    largest = max(factors.values())
    tensors: list[TensorInfo] = []
    for name in members:
        scale, info = described.tensors[f"{name}.{factor}"], described.tensors[f"{name}.{moved}"]
        tensors.append(constant(scale.name, "F32", (), struct.pack("<f", largest), scale.file))
        if factors[name] != largest:
            recipe = Mapped(recipe_of(info), rebased_bytes(factors[name], largest))
            tensors.append(made(info.name, info.dtype, info.shape, recipe, info.file))
    return _replaced(described, tensors, described.modules)


def _requantized(
    described: Canonical,
    members: tuple[str, ...],
    base: CheckpointReader | None,
    read: ReadBytes,
    *,
    measure: bool,
) -> Canonical:
    """All members quantized from the base, with one scale for the group; all that were not quantized, too."""
    assert base is not None  # or the group was refused
    found = {described.modules[name].algorithm for name in members if name in described.modules}
    algorithm: Algorithm = "nvfp4" if "nvfp4" in found else "fp8"
    tensors: list[TensorInfo] = []
    modules = dict(described.modules)
    sizes = [modules.get(name) or _size_of(described.tensors[f"{name}.weight"], algorithm) for name in members]
    weights = [of_base(base, name, (one.rows, one.columns)) for name, one in zip(members, sizes, strict=True)]
    factor = _scale_of(weights, algorithm, base, read) if measure else 1.0
    for name, weight in zip(members, weights, strict=True):
        rows, columns = weight.shape
        modules[name] = Quantized(algorithm, rows, columns)
        recipe = recipe_of(weight)
        packed = struct.pack("<f", factor)
        if algorithm == "nvfp4":
            codes = Requantized(recipe, weight.dtype, "codes", factor)
            scales = Requantized(recipe, weight.dtype, "scales", factor)
            tensors += [
                made(f"{name}.weight", "U8", (rows, columns // 2), codes, weight.file),
                made(f"{name}.weight_scale", "F8_E4M3", (rows, columns // BLOCK_SIZE), scales, weight.file),
                constant(f"{name}.weight_scale_2", "F32", (), packed, weight.file),
            ]
        else:
            codes = Requantized(recipe, weight.dtype, "fp8", factor)
            tensors += [
                made(f"{name}.weight", "F8_E4M3", (rows, columns), codes, weight.file),
                constant(f"{name}.weight_scale", "F32", (), packed, weight.file),
            ]
    return _replaced(described, tensors, modules)


def _one_input_scale(
    described: Canonical, members: tuple[str, ...], told: dict[str, str], read: ReadBytes
) -> Canonical:
    """The largest input scale for every quantized member: none is clipped by it."""
    packed = [name for name in members if name in described.modules]
    found = {name: described.tensors.get(f"{name}.input_scale") for name in packed}
    values = {name: float_of(info, read) for name, info in found.items() if info is not None}
    if not values or (len(values) == len(packed) and len(set(values.values())) == 1):
        return described
    largest = max(values.values())
    file = next(info.file for info in found.values() if info is not None)
    tensors = [constant(f"{name}.input_scale", "F32", (), struct.pack("<f", largest), file) for name in packed]
    for name in packed:
        if values.get(name) != largest:
            was = f"{values[name]:.6g}" if name in values else "none"
            told[f"{name}.input_scale"] = f"{largest:.6g}, the largest of its group, was {was}"
    return _replaced(described, tensors, described.modules)


def of_base(base: CheckpointReader, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The base's weight of a module, as the source's reader finds it beside the source's files.

    Raises:
        InputError: ``base.no_counterpart``.
    """
    info = base.tensors.get(f"{name}.weight")
    if info is None or info.shape != shape or info.dtype not in HALF_AND_FLOAT:
        what = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        raise InputError(
            f"{base.path}: {name}.weight: expected {list(shape)} in BF16, F16 or F32, found {what}",
            code="base.no_counterpart",
            path=str(base.path),
            hint="give the base that the checkpoint was made from",
        )
    return made(info.name, info.dtype, shape, Elsewhere(recipe_of(info), BASE), f"{BASE}/{info.file}")


def _size_of(info: TensorInfo, algorithm: Algorithm) -> Quantized:
    return Quantized(algorithm, info.shape[0], math.prod(info.shape[1:]))


def _scale_of(weights: list[TensorInfo], algorithm: Algorithm, base: CheckpointReader, read: ReadBytes) -> float:
    """The scale of max calibration of several weights together.

    Raises:
        InputError: ``base.not_finite``: or all are zero, which has no scale.
    """
    from modelopt_convert.formats.arithmetic import fp8_scale_of, nvfp4_scale_of
    from modelopt_convert.formats.nvfp4.codes import max_magnitude
    from modelopt_convert.formats.tensor_bytes import from_bytes

    largest = 0.0
    for info in weights:
        for begin in range(0, info.num_bytes, CHUNK_BYTES):
            raw = read(info, begin, min(CHUNK_BYTES, info.num_bytes - begin))
            amax = max_magnitude(from_bytes(raw, info.dtype, (-1,)))
            if not amax < math.inf:
                raise InputError(
                    f"{base.path}: tensor {info.name!r}: expected finite weights, found NaN or infinity",
                    code="base.not_finite",
                    path=str(base.path),
                    hint="the base is damaged; download it again",
                )
            largest = max(largest, amax)
    if not largest:
        raise InputError(
            f"{base.path}: tensor {weights[0].name!r}: a weight that is all zero has no scale",
            code="base.all_zero",
            path=str(base.path),
            hint="download the base again, or take --inexact bf16",
        )
    return nvfp4_scale_of(largest) if algorithm == "nvfp4" else fp8_scale_of(largest)


def _is_normal(quantized: Quantized, roles: Mapping[str, TensorInfo], read: ReadBytes) -> bool:
    """Whether every value but zero is a normal number in BF16."""
    scale = roles.get("weight_scale_2" if quantized.algorithm == "nvfp4" else "weight_scale")
    if quantized.algorithm not in _LEAST or scale is None or scale.shape:
        return False
    return _LEAST[quantized.algorithm] * float_of(scale, read) >= _LEAST_NORMAL


def _error(
    before: Canonical,
    after: Canonical,
    packed: tuple[str, ...],
    how: How,
    base: CheckpointReader | None,
    read: ReadBytes,
    *,
    measure: bool,
) -> tuple[float | None, bool]:
    """The relative error of a group, and whether it is a bound."""
    if measure and all(before.modules[name].algorithm in ("nvfp4", "fp8", "mxfp8") for name in packed):
        return _measured(before, after, packed, read), False
    if how == "bf16" and base is None:
        normal = all(_is_normal(before.modules[name], before.of(name), read) for name in packed)
        return (BF16_BOUND, True) if normal else (None, False)
    if how == "rebased" and before.modules[packed[0]].algorithm == "nvfp4":
        return _from_scales(before, packed, read), False
    return None, False


def _from_scales(before: Canonical, packed: tuple[str, ...], read: ReadBytes) -> float:
    """Of rebased NVFP4, as if the codes of all blocks were alike."""
    import torch

    from modelopt_convert.formats.tensor_bytes import from_bytes
    from modelopt_convert.proof.fused import rebased_error

    counts = []
    for name in packed:
        info = before.tensors[f"{name}.weight_scale"]
        count = torch.zeros(256, dtype=torch.int64)
        for begin in range(0, info.num_bytes, CHUNK_BYTES):
            raw = read(info, begin, min(CHUNK_BYTES, info.num_bytes - begin))
            count += torch.bincount(from_bytes(raw, "U8", (-1,)), minlength=256)
        counts.append(count)
    return rebased_error(counts, [float_of(before.tensors[f"{name}.weight_scale_2"], read) for name in packed])


def _measured(before: Canonical, after: Canonical, packed: tuple[str, ...], read: ReadBytes) -> float:
    """By all values of the group."""
    from modelopt_convert.formats.arithmetic import squared_error

    error = size = 0.0
    for name in packed:
        left, right = _values(before, name, read), _values(after, name, read)
        for begin in range(0, left.num_bytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, left.num_bytes - begin)
            one, other = squared_error(read(left, begin, count), read(right, begin, count))
            error, size = error + one, size + other
    return math.sqrt(error / size) if size else 0.0


def _values(described: Canonical, name: str, read: ReadBytes) -> TensorInfo:
    quantized, roles = described.modules.get(name), grouped(described.of(name).values())[name]
    return decoded(quantized, roles, "F32") if quantized is not None else cast(roles["weight"], "F32")
