"""The way back: what a record keeps of SOURCE, and what the record of a converted checkpoint says. No torch."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, read_record
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
_LONGEST = 255  # bytes of a file's name
_SHOWN = 160  # characters of what was found
_WITHOUT_BYTES = 2  # parts of a tensor's entry
SPELLINGS: tuple[Naming, ...] = ("diffusers", "comfyui", "original")
_T = TypeVar("_T")


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
        malformed: Entries of tensors that cannot be read, in words.
    """

    dialect: str
    to: str | None
    spelling: Naming
    prefix: str
    config: str | None
    files: Mapping[str, tuple[Mapping[str, str], Mapping[str, tuple[str, tuple[int, ...], bytes | None]]]]
    digests: Mapping[str, str]
    malformed: tuple[str, ...] = ()


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
    if record is None or record.get(KEY) is None:
        return None
    if single is not None and record["digests"].get("shards") != [single]:
        return None
    where = str(reader.folder / RECORD)
    try:
        return _claim(_entry(dict, record, KEY, "an object"), record["digests"]["tensors"])
    except _MalformedError as error:
        raise InputError(
            f"{where}: {error}",
            code="record.content",
            path=where,
            hint="the record was edited or is of a newer mopt; without it the conversion goes on as told",
        ) from error


class _MalformedError(ValueError):
    """An entry that is not what it has to be: its place, what was expected and what was found."""

    def __init__(self, place: str, expected: str, found: object) -> None:
        super().__init__(f"{place}: expected {expected}, found {json.dumps(found)[:_SHOWN]}")


def _entry(kind: type[_T], holder: Mapping[str, Any], key: str, expected: str, place: str = "") -> _T:
    found = holder.get(key)
    if not isinstance(found, kind):
        raise _MalformedError(f"{place}[{key!r}]" if place else key, expected, found)
    return found


def _text(holder: Mapping[str, Any], key: str) -> str | None:
    """An entry that need not be there."""
    return None if holder.get(key) is None else _entry(str, holder, key, "text")


def _claim(said: Mapping[str, Any], digests: Mapping[str, str]) -> Claim:
    files: dict[str, tuple[Mapping[str, str], Mapping[str, tuple[str, tuple[int, ...], bytes | None]]]] = {}
    malformed: list[str] = []
    listed = _entry(dict, said, "files", "an object of files")
    if len(listed) > _MAX_FILES:
        raise _MalformedError("files", f"at most {_MAX_FILES} files", len(listed))
    for name in listed:
        plain = name.endswith(".safetensors") and "/" not in name and "\\" not in name and not name.startswith(".")
        if not plain or "\0" in name or len(name.encode(errors="replace")) > _LONGEST:
            raise _MalformedError("files", "names of .safetensors files", name)
        place = f"files[{name!r}]"
        one = _entry(dict, listed, name, "an object with metadata and tensors", "files")
        tensors: dict[str, tuple[str, tuple[int, ...], bytes | None]] = {}
        for tensor, entry in _entry(dict, one, "tensors", "an object of tensors", place).items():
            try:
                tensors[tensor] = _tensor(entry, f"{place}['tensors'][{tensor!r}]")
            except _MalformedError as error:  # as if the record had no such entry
                malformed.append(str(error))
        files[name] = _metadata(_entry(list, one, "metadata", "a list of pairs", place), place), tensors
    spelling = _entry(str, said, "spelling", "text")
    if spelling not in SPELLINGS:
        raise _MalformedError("spelling", f"one of {', '.join(SPELLINGS)}", spelling)
    origin, prefix = _entry(str, said, "from", "a dialect"), _entry(str, said, "prefix", "text")
    return Claim(origin, _text(said, "to"), spelling, prefix, _text(said, "config"), files, digests, tuple(malformed))


def _metadata(pairs: list[Any], place: str) -> dict[str, str]:
    odd = next((one for one in pairs if not isinstance(one, list) or [type(part) for part in one] != [str, str]), None)
    if odd is not None:
        raise _MalformedError(f"{place}['metadata']", "pairs of text", odd)
    return dict(pairs)


def _tensor(entry: object, place: str) -> tuple[str, tuple[int, ...], bytes | None]:
    """Dtype, shape and, where they are kept, the bytes of a tensor."""
    expected = "a dtype, a shape and perhaps bytes in base64"
    if not isinstance(entry, list) or len(entry) not in (2, 3) or not isinstance(entry[1], list):
        raise _MalformedError(place, expected, entry)
    dtype, shape = entry[0], tuple(entry[1])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS or any(type(one) is not int or one < 0 for one in shape):
        raise _MalformedError(place, expected, entry)
    if len(entry) == _WITHOUT_BYTES:
        return dtype, shape, None
    try:
        data = base64.b64decode(entry[2], validate=True)
    except (TypeError, ValueError) as error:
        raise _MalformedError(place, expected, entry) from error
    if len(data) > SMALL or len(data) != num_bytes_of(dtype, shape):
        raise _MalformedError(place, f"the bytes of {dtype} {list(shape)}, at most {SMALL}", f"{len(data)} bytes")
    return dtype, shape, data


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
