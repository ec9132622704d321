"""The way back: what a record keeps of SOURCE, and what the record of a converted checkpoint says. No torch."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import read_record
from modelopt_convert.dialects.form import Canonical, Naming, ReadBytes
from modelopt_convert.dialects.renaming import under_native_names
from modelopt_convert.dialects.source import Source
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found, beside
from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.formats.dtypes import num_bytes as num_bytes_of
from modelopt_convert.run.errors import InputError

KEY = "converted"
SMALL = 4096  # bytes of a tensor that a record keeps
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
        to: The dialect of the file at hand; None if the record does not say it.
        spelling: Of its names.
        prefix: In front of each.
        config: The text of its config.json, if it had one.
        files: For each of its files, the header's metadata and the tensors: dtype, shape, and bytes where kept.
        digests: Of the tensors of the file at hand, as the record has them, by their names there.
    """

    dialect: str
    to: str | None
    spelling: Naming
    prefix: str
    config: str | None
    files: Mapping[str, tuple[Mapping[str, str], Mapping[str, tuple[str, tuple[int, ...], bytes | None]]]]
    digests: Mapping[str, str]


def keep(
    reader: CheckpointReader,
    source: Source,
    settled: Canonical,
    expected: Canonical,
    config_text: str | None,
    to: str,
) -> Kept:
    """Plan the conversion of the output back, without writing it, and keep what would differ from the source then.

    Args:
        reader: The source, as it was opened.
        source: What was made out of it.
        settled: What is written.
        expected: What a reader of the output finds of that.
        config_text: Of its config.json, if it has one of its own.
        to: The target's name.
    """
    read, found = reader.read_of, source.found
    try:
        again = source.form.write(named(expected, found.family, found.spelling, found.prefix), read).tensors
    except InputError:  # what is left has no place in the source's dialect, such as BF16 alone
        again = {}
    # By identity: what is kept as it was is the very same object.
    before, after = source.described.tensors, settled.tensors
    touched = {
        native_name(name, found) for name in before.keys() | after.keys() if before.get(name) is not after.get(name)
    }
    files: dict[str, dict[str, Any]] = {}
    # What lies beside the transformer does not come back in part, either.
    lost = list(rest := beside(reader.tensors, found))
    for name, info in reader.tensors.items():
        if name in rest:
            continue
        entry: list[Any] = [info.dtype, list(info.shape)]
        made = again.get(name)
        if name in touched:
            lost.append(name)
        elif not is_same(made, info, read):
            if info.num_bytes <= SMALL:
                entry.append(base64.b64encode(read(info, 0, info.num_bytes)).decode())
            elif made is None or made.num_bytes != info.num_bytes or is_moved(made, info):
                lost.append(name)
        file = files.setdefault(info.file, {"metadata": list(reader.metadata.get(info.file, {}).items())})
        file.setdefault("tensors", {})[name] = entry
    entry_of = {
        "from": source.form.name,
        "to": to,
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
    record = read_record(reader.folder)
    said = record.get(KEY) if record is not None else None
    if record is None or not isinstance(said, dict):
        return None
    if single is not None and record["digests"].get("shards") != [single]:
        return None
    try:
        return _claim(said, record["digests"]["tensors"])
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        where = str(reader.folder / "mopt.json")
        raise InputError(
            f"{where}: what it says of the conversion is malformed ({str(error)[:80]})",
            code="record.content",
            path=where,
            hint="the record was edited or is of a newer mopt; without it the conversion goes on as told",
        ) from error


def _claim(said: Mapping[str, Any], digests: Mapping[str, str]) -> Claim:
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
            dtype, shape = str(entry[0]), tuple(entry[1])
            if dtype not in DTYPE_BITS or any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"no tensor: {tensor[:40]!r}")
            data = base64.b64decode(entry[2], validate=True) if len(entry) > 2 else None
            if data is not None and (len(data) > SMALL or len(data) != num_bytes_of(dtype, shape)):
                raise ValueError(f"size of {tensor[:40]!r}")
            tensors[tensor] = dtype, shape, data
        files[name] = metadata, tensors
    spelling = said["spelling"]
    if spelling not in ("diffusers", "comfyui", "original"):
        raise ValueError("spelling")
    to, config = said.get("to"), said.get("config")
    told = None if to is None else str(to)
    text = None if config is None else str(config)
    return Claim(str(said["from"]), told, spelling, str(said["prefix"]), text, files, digests)


def named(described: Canonical, family: Family, spelling: Naming, prefix: str) -> Canonical:
    """A description under the names of a spelling, with a prefix."""
    if spelling == "diffusers" and not prefix:
        return described
    return under_native_names(described, family, spelling, prefix)


def native_name(name: str, found: Found) -> str:
    """The own name of a tensor in the checkpoint that has these names."""
    place = found.family.native_tensor(name, found.spelling) if found.spelling != "diffusers" or found.prefix else None
    return name if place is None else f"{found.prefix}{place[0]}"


def is_moved(made: TensorInfo, info: TensorInfo) -> bool:
    """Whether the elements of two tensors lie in another order: their shapes differ by more than ones."""
    ones = [size for size in made.shape if size != 1], [size for size in info.shape if size != 1]
    return ones[0] != ones[1]


def is_same(made: TensorInfo | None, info: TensorInfo | None, read: ReadBytes) -> bool:
    """Whether two tensors are equal; of large ones dtype and shape are compared: recipes both ways are inverse."""
    if made is None or info is None:
        return made is info
    if (made.dtype, made.shape) != (info.dtype, info.shape):
        return False
    if made is info or info.num_bytes > SMALL:
        return True
    if made.recipe is None and info.recipe is None and (made.file, made.start) == (info.file, info.start):
        return True
    return read(made, 0, made.num_bytes) == read(info, 0, info.num_bytes)
