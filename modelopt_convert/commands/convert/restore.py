"""The way back: an output gets the tensors, files and config that it had before, as far as a record can be trusted.

A record is a claim. A tensor of it is used only if writing it in the dialect of the file at hand gives that file's very
bytes: so ``1/g`` of a kept ``g`` has to be the stored reciprocal. What the file says nothing of, such as quantizer
state or a scale that its dialect has no place for, is used only if the record is of the very bytes of the file, and is
told.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import xxhash

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.commands.convert.restored_config import ClaimedConfig
from modelopt_convert.commands.convert.way_back import SMALL, Claim, is_moved, is_same, named, native_name
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import ROW_ROLES, Canonical, Form, ReadBytes, Written, constant
from modelopt_convert.dialects.renaming import under_diffusers_names
from modelopt_convert.dialects.source import Source
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found, candidates
from modelopt_convert.formats.dtypes import num_bytes as num_bytes_of
from modelopt_convert.plan.plan import ShardPlan
from modelopt_convert.run.errors import InputError

_CONFIG = "config.json"
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
_PIECE = 1 << 20  # bytes that are digested at a time


@dataclass(frozen=True, slots=True)
class Restored:
    """An output as it was before, as far as the claim holds.

    Attributes:
        written: The output.
        shards: Its files.
        config: The claimed config.json, as far as it is used.
        used: Tensors whose bytes are the record's.
        alone: The scales among them of which the file at hand says nothing. No engine reads quantizer state.
        not_used: What of the claim was not used, in words.
        found: What a reader of the output finds of these, by diffusers' names.
    """

    written: Written
    shards: tuple[ShardPlan, ...]
    config: ClaimedConfig
    used: tuple[str, ...]
    alone: tuple[str, ...]
    not_used: tuple[str, ...]
    found: Mapping[str, TensorInfo] = field(default_factory=dict)


def restore(
    written: Written,
    claim: Claim,
    target: Form,
    source: Source,
    settled: Canonical,
    raw: Mapping[str, TensorInfo],
    read: ReadBytes,
    where: str,
    config: ClaimedConfig,
) -> Restored | str:
    """Give an output the tensors, files and config that a claim says it had, as far as it holds.

    Args:
        written: The output.
        claim: The claim, whose dialect is the target's.
        target: Its form.
        source: What the file at hand is.
        settled: What is written, under diffusers' names.
        raw: Tensors of the file at hand.
        read: Reads them.
        where: The file at hand, for messages.
        config: What of the claimed config.json can be used.

    Returns:
        The output; in words why not, where nothing of the claim holds.
    """
    missing = _missing(written, claim)
    if missing:
        config = ClaimedConfig(None)
    alone = set() if missing else _alone(written, claim)
    changed = changed_since(claim.digests, raw, read) if alone else None
    refused = alone if changed is not None else set()
    for _ in range(3):  # each round has fewer tensors of the claim; what is left after that is not used
        candidate, used = _candidate(written, claim, refused, extra=not missing)
        metadata = {file: written.metadata if missing else entries for file, (entries, _) in claim.files.items()}
        try:
            again = _described(
                candidate, claim, target, source.found.family, config.text, metadata, settled, read, where
            )
        except InputError as error:
            return error.message
        odd = {
            name
            for name in again.tensors.keys() | settled.tensors.keys()
            if not is_same(again.tensors.get(name), settled.tensors.get(name), read)
        }
        if again.modules != settled.modules or any(
            _is_large(again.tensors.get(name)) or _is_large(settled.tensors.get(name)) for name in odd
        ):
            return "it is of another checkpoint"
        try:
            wrong = _contradicted(again, odd, source, raw, read)
        except InputError as error:  # a tensor that the model does not have, or the dialect of SOURCE no place for
            return error.message
        if not wrong:
            found = {name: again.tensors[name] for name in odd}
            shards = _shards(candidate, claim, metadata)
            if any(
                name.endswith(".input_scale") for name in refused - candidate.tensors.keys()
            ):  # the config was judged with them
                config = ClaimedConfig(None, (*config.not_used, "config.json: it is of input scales that are not used"))
            other = [f"{name}: the record is of another {changed}" for name in sorted(refused & alone)]
            odd_ones = [f"{name}: the file says otherwise" for name in sorted(refused - alone)]
            not_used = [*other, *config.not_used, *missing, *odd_ones]
            kept = tuple(name for name in used if name in alone and name.rpartition(".")[2] in _SCALES)
            return Restored(candidate, shards, config, tuple(used), kept, tuple(not_used), found)
        before = len(refused)
        refused |= {name for name in used if any(_in_module(name, one, claim, source) for one in wrong)}
        if len(refused) == before:
            break
    return "the file says otherwise"


def other_model(claim: Claim, found: Found) -> str | None:
    """Why the tensors of a claim are not those of the model at hand, under the names that the claim says; else None."""
    shapes = {name: shape for _, claimed in claim.files.values() for name, (_, shape, _) in claimed.items()}
    several = candidates(shapes)
    if not several and not found.family.rows and (claim.spelling, claim.prefix) == ("diffusers", ""):
        return None
    if len(several) != 1 or several[0].family.name != found.family.name:
        return f"its tensors are not those of {found.family.title} whole"
    one = several[0]
    if (one.spelling, one.prefix) != (claim.spelling, claim.prefix):
        said = f"{claim.spelling} under {claim.prefix[:40]!r}"
        return f"it says names of {said}, and has those of {one.spelling} under {one.prefix!r}"
    return None


def _is_large(info: TensorInfo | None) -> bool:
    return info is not None and info.num_bytes > SMALL


def _missing(written: Written, claim: Claim) -> list[str]:
    """Tensors of the claim that neither the file at hand nor the record gives back, in words."""
    words: list[str] = []
    for _, claimed in claim.files.values():
        for name, (dtype, shape, data) in claimed.items():
            made = written.tensors.get(name)
            if data is not None and (made is None or made.num_bytes <= SMALL):
                continue
            if made is None:
                words.append(f"{name}: nothing gives it back")
            elif not _fits_shape(made, dtype, shape):
                words.append(f"{name}: it was {dtype} {list(shape)}, and is {made.dtype} {list(made.shape)}")
    return words


def _alone(written: Written, claim: Claim) -> set[str]:
    """Tensors of the claim that the record alone has: no tensor of the output stands for them."""
    return {
        name
        for _, claimed in claim.files.values()
        for name, (_, _, data) in claimed.items()
        if data is not None and name not in written.tensors
    }


def changed_since(digests: Mapping[str, str], raw: Mapping[str, TensorInfo], read: ReadBytes) -> str | None:
    """The first tensor of the file at hand that is not the one that its record is of; None if all are."""
    for name in sorted(digests.keys() | raw.keys()):
        info = raw.get(name)
        if info is None or name not in digests:
            return name
        digest = xxhash.xxh3_128()
        for begin in range(0, info.num_bytes, _PIECE):
            digest.update(read(info, begin, min(_PIECE, info.num_bytes - begin)))
        if digest.hexdigest() != digests[name]:
            return name
    return None


def _candidate(written: Written, claim: Claim, refused: set[str], *, extra: bool) -> tuple[Written, list[str]]:
    """The output with all parts of the claim that are not refused, and the names of the tensors that are used.

    Args:
        written: The output.
        claim: The claim.
        refused: Tensors of the claim that are not used.
        extra: Whether tensors are used that the output has not: only where nothing of the claim is missing.
    """
    tensors = dict(written.tensors)
    used: list[str] = []
    for file, (_, claimed) in claim.files.items():
        for name, (dtype, shape, data) in claimed.items():
            made = tensors.get(name)
            if name in refused or (made is None and not extra):
                continue
            if data is not None and (made is None or made.num_bytes <= SMALL):
                tensors[name] = constant(name, dtype, shape, data, made.file if made is not None else file)
                used.append(name)
            elif made is not None and _fits_shape(made, dtype, shape):
                tensors[name] = replace(made, dtype=dtype, shape=shape)
    return replace(written, tensors=tensors), used


def _fits_shape(made: TensorInfo, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether the bytes of a tensor are the same values in a claimed dtype and shape.

    Bytes of one width are other values in another dtype, but for E8M0, which dialects keep as U8 too.
    """
    dtypes = {made.dtype, dtype}
    scales = made.name.endswith(".weight_scale") and dtypes == {"U8", "F8_E8M0"}
    if (len(dtypes) > 1 and not scales) or made.num_bytes != num_bytes_of(dtype, shape):
        return False
    return not is_moved(made, replace(made, shape=shape))


def _described(
    candidate: Written,
    claim: Claim,
    target: Form,
    family: Family,
    config: str | None,
    metadata: Mapping[str, Mapping[str, str]],
    settled: Canonical,
    read: ReadBytes,
    where: str,
) -> Canonical:
    """The output as its reader will describe it, under diffusers' names."""
    from modelopt_convert.checkpoint.strict_json import parse_json_object

    said = parse_json_object(config.encode(), code="config", path=_CONFIG) if config is not None else candidate.config
    headers = Headers(
        candidate.tensors, {file: dict(entries) for file, entries in metadata.items()}, dict(said or {}), ()
    )
    found = Found(family, claim.spelling, claim.prefix, [])
    shapes: dict[str, tuple[int, int]] = {}
    for name, quantized in settled.modules.items():
        place = family.native(name, claim.spelling)
        home = name if place is None else f"{claim.prefix}{place[0]}"
        shapes[home] = shapes.get(home, (0, 0))[0] + quantized.rows, quantized.columns
    described = target.read(headers, read, shapes, where)
    if claim.spelling == "diffusers" and not claim.prefix:
        return described
    return under_diffusers_names(described, found, where)


def _contradicted(
    again: Canonical, odd: set[str], source: Source, raw: Mapping[str, TensorInfo], read: ReadBytes
) -> set[str]:
    """Modules whose claimed tensors, written in the dialect of the file at hand, are not what the file has."""
    found = source.found
    wrong = {module_of(name) for name in odd if not _fits(again.tensors.get(name), read)}
    wrong |= {module_of(name) for name in odd if not _is_shared(name, again, found, read)}
    if wrong:
        return wrong
    forward = source.form.write(named(again, found.family, found.spelling, found.prefix), read).tensors
    homes = {module_of(native_name(name, found)): module_of(name) for name in odd}
    for name in forward.keys() | raw.keys():
        home = homes.get(module_of(name))
        if home is not None and not _same_value(forward.get(name), raw.get(name), read):
            wrong.add(home)
    return wrong


def _is_shared(name: str, again: Canonical, found: Found, read: ReadBytes) -> bool:
    """Whether a tensor of which the file has one for a whole fused module is the same in all its members.

    Written again the module would have that of its first member, and nothing would be compared with the others'.
    """
    place, info = found.family.native_tensor(name, found.spelling), again.tensors.get(name)
    if place is None or info is None or (name.rpartition(".")[2] in ROW_ROLES and info.shape):
        return True
    return all(is_same(info, again.tensors.get(one), read) for one in found.family.tensor(place[0]) or ())


def _fits(info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether a claimed tensor can be one: a scale of one number is positive and finite."""
    if info is None:
        return False
    if info.name.rpartition(".")[2] in _SCALES and info.dtype == "F32" and not info.shape:
        value = float(struct.unpack("<f", read(info, 0, 4))[0])
        return math.isfinite(value) and value > 0
    return True


def _same_value(made: TensorInfo | None, info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether small tensors are the same values; a scale of shape [] or [1] is the same."""
    if made is None or info is None:
        return made is info
    if made.dtype != info.dtype and {made.dtype, info.dtype} != {"U8", "F8_E8M0"}:
        return False
    is_scale = info.name.rpartition(".")[2] not in ("weight", "bias")
    if made.shape != info.shape and not (is_scale and not is_moved(made, info)):
        return False
    if _is_large(made) or _is_large(info):
        return made.num_bytes == info.num_bytes
    return read(made, 0, made.num_bytes) == read(info, 0, info.num_bytes)


def _in_module(name: str, module: str, claim: Claim, source: Source) -> bool:
    """Whether a claimed tensor is of a module by diffusers' names."""
    place = source.found.family.native(module, claim.spelling)
    home = module if place is None or claim.spelling == "diffusers" else place[0]
    return module_of(name) in (module, f"{claim.prefix}{home}")


def _shards(candidate: Written, claim: Claim, metadata: Mapping[str, Mapping[str, str]]) -> tuple[ShardPlan, ...]:
    """The claimed files; a tensor that none of these has goes into the last."""
    home = {name: file for file, (_, claimed) in claim.files.items() for name in claimed}
    last = list(claim.files)[-1]
    specs: dict[str, list[TensorSpec]] = {file: [] for file in claim.files}
    for info in candidate.tensors.values():
        specs[home.get(info.name, last)].append(TensorSpec(info.name, info.dtype, info.shape))
    return tuple(ShardPlan(file, tuple(found), metadata[file]) for file, found in specs.items() if found)
