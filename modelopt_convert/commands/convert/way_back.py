"""The way back: what a record keeps of SOURCE, and what of a record is used when OUTPUT is converted back. No torch.

A record is a claim. A tensor of it is used only if writing it in the dialect of the file at hand gives that file's very
bytes: so ``1/g`` of a kept ``g`` has to be the stored reciprocal. What the file says nothing of, such as quantizer
state or a scale that its dialect has no place for, has to fit in dtype and shape, and is told.
"""

import base64
import binascii
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import read_record
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Form, Naming, ReadBytes, Written, constant
from modelopt_convert.dialects.naming import under_diffusers_names, under_native_names
from modelopt_convert.dialects.source import Source
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found
from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.formats.dtypes import num_bytes as num_bytes_of
from modelopt_convert.formats.layout import declared_layout
from modelopt_convert.plan.plan import ShardPlan
from modelopt_convert.run.errors import InputError

KEY = "converted"
_SMALL = 4096  # bytes of a tensor that a record keeps
_CONFIG = "config.json"
_QUANTIZATION = "quantization_config"
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
_MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Kept:
    """What a record keeps of a source.

    Attributes:
        entry: For the record.
        lost: Tensors of the source that converting back does not give.
    """

    entry: Mapping[str, Any]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a record says of the checkpoint that the file at hand was made from.

    Attributes:
        dialect: Of that checkpoint, by its ``--to`` name.
        spelling: Of its names.
        prefix: In front of each.
        config: The text of its config.json, if it had one.
        files: For each of its files, the header's metadata and the tensors: dtype, shape, and bytes where kept.
    """

    dialect: str
    spelling: Naming
    prefix: str
    config: str | None
    files: Mapping[str, tuple[Mapping[str, str], Mapping[str, tuple[str, tuple[int, ...], bytes | None]]]]


@dataclass(frozen=True, slots=True)
class Restored:
    """An output as it was before, as far as the claim holds.

    Attributes:
        written: The output.
        shards: Its files.
        config: The text of config.json; None where the output's own is written.
        used: Tensors whose bytes are the record's.
        not_used: What of the claim was not used, in words.
        changed: What a reader of the output finds instead of the description's bytes, for these.
    """

    written: Written
    shards: tuple[ShardPlan, ...]
    config: str | None
    used: tuple[str, ...]
    not_used: tuple[str, ...]
    changed: Mapping[str, bytes] = field(default_factory=dict)


def keep(
    reader: CheckpointReader,
    source: Source,
    settled: Canonical,
    changed: Mapping[str, bytes | None],
    config_text: str | None,
) -> Kept:
    """Write the output back in thought, and keep what is not the source then.

    Args:
        reader: The source, as it was opened.
        source: What was made out of it.
        settled: What is written.
        changed: What a reader of the output finds instead, by tensor.
        config_text: Of its config.json, if it has one of its own.
    """
    read, found = reader.read_of, source.found
    seen = _seen(settled, changed)
    try:
        again = source.form.write(_named(seen, found.family, found.spelling, found.prefix), read).tensors
    except InputError:  # what is left has no place in the source's dialect, such as BF16 alone
        again = {}
    # By identity: what is kept as it was is the very same object.
    before, after = source.described.tensors, settled.tensors
    touched = {_native(name, found) for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    files: dict[str, dict[str, Any]] = {}
    lost: list[str] = []
    for name, info in reader.tensors.items():
        entry: list[Any] = [info.dtype, list(info.shape)]
        made = again.get(name)
        if name in touched:
            lost.append(name)
        elif not _is_same(made, info, read):
            if info.num_bytes <= _SMALL:
                entry.append(base64.b64encode(read(info, 0, info.num_bytes)).decode())
            elif made is None or made.num_bytes != info.num_bytes or _is_moved(made, info):
                lost.append(name)
        file = files.setdefault(info.file, {"metadata": list(reader.metadata.get(info.file, {}).items())})
        file.setdefault("tensors", {})[name] = entry
    entry_of = {
        "from": source.form.name,
        "spelling": found.spelling,
        "prefix": found.prefix,
        "files": files,
        **({"config": config_text} if config_text is not None else {}),
    }
    return Kept(entry_of, tuple(lost))


def read_claim(reader: CheckpointReader, single: str | None) -> Claim | None:
    """What the record beside a checkpoint says of where it came from; None without such a record.

    Args:
        reader: The checkpoint.
        single: The name of the file, where one was given: a record has to be of that file alone.

    Raises:
        InputError: ``record.*``: a record is there, and cannot be used.
    """
    record = read_record(reader.path)
    said = record.get(KEY) if record is not None else None
    if record is None or not isinstance(said, dict):
        return None
    if single is not None and record["digests"].get("shards") != [single]:
        return None
    try:
        return _claim(said)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        where = str(reader.path / "mopt.json")
        raise InputError(
            f"{where}: what it says of the conversion is malformed ({str(error)[:80]})",
            code="record.content",
            path=where,
            hint="the record was edited or is of a newer mopt; without it the conversion goes on as told",
        ) from error


def _claim(said: Mapping[str, Any]) -> Claim:
    files: dict[str, tuple[Mapping[str, str], Mapping[str, tuple[str, tuple[int, ...], bytes | None]]]] = {}
    if len(said["files"]) > _MAX_FILES:
        raise ValueError("too many files")
    for name, one in said["files"].items():
        plain = name.endswith(".safetensors") and "/" not in name and "\\" not in name and not name.startswith(".")
        if not plain or "\0" in name or len(name.encode()) > 255:
            raise ValueError(f"no name of a file: {name[:40]!r}")
        metadata = {str(key): str(value) for key, value in one["metadata"]}
        tensors: dict[str, tuple[str, tuple[int, ...], bytes | None]] = {}
        for tensor, entry in one["tensors"].items():
            dtype, shape = str(entry[0]), tuple(int(size) for size in entry[1])
            if dtype not in DTYPE_BITS or min(shape, default=0) < 0:
                raise ValueError(f"no tensor: {tensor[:40]!r}")
            data = base64.b64decode(entry[2], validate=True) if len(entry) > 2 else None
            if data is not None and (len(data) > _SMALL or len(data) != num_bytes_of(dtype, shape)):
                raise ValueError(f"size of {tensor[:40]!r}")
            tensors[tensor] = dtype, shape, data
        files[name] = metadata, tensors
    spelling = said["spelling"]
    if spelling not in ("diffusers", "comfyui", "original"):
        raise ValueError("spelling")
    config = said.get("config")
    return Claim(str(said["from"]), spelling, str(said["prefix"]), None if config is None else str(config), files)


def restore(
    written: Written,
    claim: Claim,
    target: Form,
    source: Source,
    settled: Canonical,
    raw: Mapping[str, TensorInfo],
    read: ReadBytes,
    where: str,
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

    Returns:
        The output; in words why not, where nothing of the claim holds.
    """
    refused: set[str] = set()
    missing = _missing(written, claim)
    config, told = (None, []) if missing else _config_of(claim, written, settled)
    for _ in range(3):  # each round has fewer tensors of the claim; what is left after that is not used
        candidate, used = _candidate(written, claim, refused, extra=not missing)
        metadata = {file: written.metadata if missing else entries for file, (entries, _) in claim.files.items()}
        try:
            again = _described(candidate, claim, target, source.found.family, config, metadata, settled, read, where)
        except InputError as error:
            return error.message
        odd = {
            name
            for name in again.tensors.keys() | settled.tensors.keys()
            if not _is_same(again.tensors.get(name), settled.tensors.get(name), read)
        }
        if again.modules != settled.modules or any(
            _is_large(again.tensors.get(name)) or _is_large(settled.tensors.get(name)) for name in odd
        ):
            return "it is of another checkpoint"
        wrong = _contradicted(again, odd, source, raw, read)
        if not wrong:
            changed = {name: read(again.tensors[name], 0, again.tensors[name].num_bytes) for name in odd}
            shards = _shards(candidate, claim, metadata)
            not_used = [*told, *missing, *(f"{name}: the file says otherwise" for name in sorted(refused))]
            return Restored(candidate, shards, config, tuple(used), tuple(not_used), changed)
        before = len(refused)
        refused |= {name for name in used if any(_in_module(name, one, claim, source) for one in wrong)}
        if len(refused) == before:
            break
    return "the file says otherwise"


def _seen(settled: Canonical, changed: Mapping[str, bytes | None]) -> Canonical:
    """What a reader of the output finds."""
    tensors = {name: info for name, info in settled.tensors.items() if changed.get(name, b"") is not None}
    for name, data in changed.items():
        if data is not None and name in tensors:
            info = tensors[name]
            tensors[name] = constant(name, info.dtype, info.shape, data, info.file)
    return replace(settled, tensors=tensors)


def _named(described: Canonical, family: Family, spelling: Naming, prefix: str) -> Canonical:
    if spelling == "diffusers" and not prefix:
        return described
    return under_native_names(described, family, spelling, prefix)


def _native(name: str, found: Found) -> str:
    place = found.family.native_tensor(name, found.spelling) if found.spelling != "diffusers" or found.prefix else None
    return name if place is None else f"{found.prefix}{place[0]}"


def _is_large(info: TensorInfo | None) -> bool:
    return info is not None and info.num_bytes > _SMALL


def _is_moved(made: TensorInfo, info: TensorInfo) -> bool:
    """Whether the elements of two tensors lie in another order: their shapes differ by more than ones."""
    ones = [size for size in made.shape if size != 1], [size for size in info.shape if size != 1]
    return ones[0] != ones[1]


def _is_same(made: TensorInfo | None, info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether two tensors are equal; of large ones dtype and shape are compared: recipes both ways are inverse."""
    if made is None or info is None:
        return made is info
    if (made.dtype, made.shape) != (info.dtype, info.shape):
        return False
    if made is info or info.num_bytes > _SMALL:
        return True
    if made.recipe is None and info.recipe is None and (made.file, made.start) == (info.file, info.start):
        return True
    return read(made, 0, made.num_bytes) == read(info, 0, info.num_bytes)


def _missing(written: Written, claim: Claim) -> list[str]:
    """Tensors of the claim that neither the file at hand nor the record gives back, in words."""
    words: list[str] = []
    for _, claimed in claim.files.values():
        for name, (dtype, shape, data) in claimed.items():
            made = written.tensors.get(name)
            if data is not None and (made is None or made.num_bytes <= _SMALL):
                continue
            if made is None:
                words.append(f"{name}: nothing gives it back")
            elif not _fits_shape(made, dtype, shape):
                words.append(f"{name}: it was {dtype} {list(shape)}, and is {made.dtype} {list(made.shape)}")
    return words


def _candidate(written: Written, claim: Claim, refused: set[str], *, extra: bool) -> tuple[Written, list[str]]:
    """The output with everything of the claim that is not refused, and the names of what is used.

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
            if data is not None and (made is None or made.num_bytes <= _SMALL):
                tensors[name] = constant(name, dtype, shape, data, made.file if made is not None else file)
                used.append(name)
            elif made is not None and _fits_shape(made, dtype, shape):
                tensors[name] = replace(made, dtype=dtype, shape=shape)
    return replace(written, tensors=tensors), used


def _fits_shape(made: TensorInfo, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether the bytes of a tensor are those of another dtype and shape of the same order."""
    if made.num_bytes != num_bytes_of(dtype, shape) or DTYPE_BITS[made.dtype] != DTYPE_BITS[dtype]:
        return False
    return not _is_moved(made, replace(made, shape=shape))


def _config_of(claim: Claim, written: Written, settled: Canonical) -> tuple[str | None, list[str]]:
    """The claimed text of config.json, if it says nothing that the file at hand contradicts."""
    if claim.config is None:
        return None, []
    from modelopt_convert.checkpoint.strict_json import parse_json_object

    try:
        said = parse_json_object(claim.config.encode(), code="config", path=_CONFIG)
    except (InputError, UnicodeEncodeError) as error:
        return None, [f"{_CONFIG}: {error}"]
    left_out = ("_name_or_path", _QUANTIZATION)
    known = {key: value for key, value in settled.config.items() if key not in left_out}
    if known and known != {key: value for key, value in said.items() if key not in left_out}:
        return None, [f"{_CONFIG}: the record has another than SOURCE"]
    mine = (written.config or {}).get(_QUANTIZATION) or {}
    claimed = said.get(_QUANTIZATION) or {}
    if not isinstance(claimed, dict) or declared_layout(claimed) != declared_layout(mine):
        return None, [f"{_CONFIG}: the record declares another layout"]
    return claim.config, []


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
    rows: dict[str, int] = {}
    for name, quantized in settled.modules.items():
        place = family.native(name, claim.spelling)
        home = name if place is None else f"{claim.prefix}{place[0]}"
        rows[home] = rows.get(home, 0) + quantized.rows
    described = target.read(headers, read, rows, where)
    if claim.spelling == "diffusers" and not claim.prefix:
        return described
    return under_diffusers_names(described, found, where)


def _contradicted(
    again: Canonical, odd: set[str], source: Source, raw: Mapping[str, TensorInfo], read: ReadBytes
) -> set[str]:
    """Modules whose claimed tensors, written in the dialect of the file at hand, are not what the file has."""
    found = source.found
    wrong = {module_of(name) for name in odd if not _fits(again.tensors.get(name), read)}
    if wrong:
        return wrong
    forward = source.form.write(_named(again, found.family, found.spelling, found.prefix), read).tensors
    homes = {module_of(_native(name, found)): module_of(name) for name in odd}
    for name in forward.keys() | raw.keys():
        home = homes.get(module_of(name))
        if home is not None and not _same_value(forward.get(name), raw.get(name), read):
            wrong.add(home)
    return wrong


def _fits(info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether a claimed tensor can be one: a scale of one number is positive and finite."""
    if info is None:
        return False
    if info.name.rpartition(".")[2] in _SCALES and info.dtype == "F32" and not info.shape:
        value = float(struct.unpack("<f", read(info, 0, 4))[0])
        return math.isfinite(value) and value > 0
    return True


def _same_value(made: TensorInfo | None, info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether small tensors have the same bytes; a shape of [] or [1] is the same value."""
    if made is None or info is None:
        return made is info
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
