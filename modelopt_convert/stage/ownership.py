"""What in an existing OUT is known to be the checkpoint, and what is somebody's own work. No torch.

A small file is the checkpoint's if the record lists it with its digest. Weights are, if the record or its index lists
them, their headers give the recorded digest, and each tensor its own. All bytes are read: a copy of an edited
checkpoint has no time that would tell of the edit.
"""

import functools
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from modelopt_convert.checkpoint.digests import headers_digest
from modelopt_convert.checkpoint.header import PREFIX_BYTES, Header, parse_header, read_header_length
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.reader import INDEX_SUFFIX, MAX_INDEX_BYTES
from modelopt_convert.checkpoint.record import RECORD, copied_files, digest_of, read_record
from modelopt_convert.checkpoint.strict_json import json_bytes, parse_json_object
from modelopt_convert.run.errors import InputError

_SHOWN = 10
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a folder, or whatever else has a name.

    Attributes:
        kind: Its type, as in ``st_mode``.
        num_bytes: Its size; 0 of a folder.
        changed_ns: When its content was changed last; 0 of a folder, whose names say it.
        mode: Its permissions, which may be changed at any time.
    """

    kind: int
    num_bytes: int
    changed_ns: int
    mode: int = field(default=0, compare=False)

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file."""
        return self.kind == stat.S_IFREG


Tree = Mapping[str, Entry]
"""Everything below a folder, by its path from there."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands at OUT and may be replaced.

    Attributes:
        tree: All of it.
        foreign: What of it is not known to be the checkpoint's; a folder, with its slash, for all that it holds.
    """

    tree: Tree
    foreign: tuple[str, ...]

    def mode_for(self, name: str) -> int | None:
        """The mode that a file of the new checkpoint takes over: of the file that it replaces, or what all allow."""
        if (same := self.tree.get(name)) is not None and same.is_file:
            return same.mode
        modes = [one.mode for one in self.tree.values() if one.is_file]
        return functools.reduce(int.__and__, modes) | stat.S_IRUSR | stat.S_IWUSR if modes else None


def look(folder: Path) -> dict[str, Entry]:
    """Everything below a folder; no link is followed, and what vanishes meanwhile is left out.

    Raises:
        OSError: A folder cannot be listed.
    """
    found: dict[str, Entry] = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            names = os.listdir(folder / prefix)
        except FileNotFoundError:
            continue
        for name in names:
            path = f"{prefix}{name}"
            try:
                status = (folder / path).lstat()
            except FileNotFoundError:
                continue
            kind, mode = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
            if kind == stat.S_IFDIR:
                waiting.append(f"{path}/")
                found[path] = Entry(kind, 0, 0, mode)
            else:
                found[path] = Entry(kind, status.st_size, status.st_mtime_ns, mode)
    return found


def standing_at(output: Path) -> Standing:
    """Look at an existing OUT.

    Raises:
        OSError: It cannot be read.
    """
    tree = look(output)
    owned = _owned(output, tree, "")
    known = {str(parent) for name in owned for parent in PurePosixPath(name).parents}
    foreign: dict[str, Entry] = {}
    for name in sorted(tree, key=lambda one: PurePosixPath(one).parts):
        inside = any(str(parent) in foreign for parent in PurePosixPath(name).parents)
        if name not in owned and name not in known and not inside:
            foreign[name] = tree[name]
    return Standing(tree, tuple(f"{name}/" if one.kind == stat.S_IFDIR else name for name, one in foreign.items()))


def changed(before: Standing, now: Standing) -> list[str]:
    """What is not as it was, what came and what went; also what was edited under the old size and time."""
    names = before.tree.keys() | now.tree.keys()
    return sorted(
        {name for name in names if before.tree.get(name) != now.tree.get(name)} | {*now.foreign} - {*before.foreign}
    )


def in_words(names: Iterable[str]) -> str:
    """The first names, and how many there are beside them; a name that is no text is escaped."""
    plain = [name.encode(errors="backslashreplace").decode() for name in names]
    more = f" and {len(plain) - _SHOWN} more" if len(plain) > _SHOWN else ""
    return f"{', '.join(plain[:_SHOWN])}{more}"


def _owned(output: Path, tree: Tree, prefix: str) -> set[str]:
    """What the record of OUT, or of one of its transformers, lists and what is as it says."""
    folder = output / prefix
    plain = {
        name.removeprefix(prefix)
        for name, entry in tree.items()
        if entry.is_file and name.rpartition("/")[0] == prefix.rstrip("/")
    }
    record = _record(folder) if RECORD in plain else None
    if record is None:
        return set()
    files: Mapping[str, str] = record["digests"]["files"]
    owned = {RECORD} | {name for name in plain & files.keys() if _small_digest(folder / name) == files[name]}
    owned |= _weights(folder, record, plain, [name for name in owned if name.endswith(INDEX_SUFFIX)])
    found = {f"{prefix}{name}" for name in owned}
    if not prefix:
        found |= {name for name, digest in copied_files(record).items() if _is_copy(output, name, tree, digest)}
    parts = record.get("parts")
    for name, digest in parts.items() if isinstance(parts, dict) and not prefix else ():
        own = tree.get(f"{name}/{RECORD}")
        if "/" not in name and own is not None and own.is_file and _small_digest(folder / name / RECORD) == digest:
            found |= _owned(output, tree, f"{name}/")
    return found


def _is_copy(output: Path, name: str, tree: Tree, digest: str) -> bool:
    """Whether a file is the one that was copied from the base's pipeline."""
    if (entry := tree.get(name)) is None or not entry.is_file:
        return False
    found = _digests(output / name, _state(output / name), ((name, 0, entry.num_bytes),))
    return found == {name: digest}


def _record(folder: Path) -> dict[str, Any] | None:
    """The record, if mopt wrote it and nobody edited it: mopt writes a record in one way only."""
    try:
        record = read_record(folder)
    except InputError as error:
        _refuse_unread(error)
        return None
    raw = (folder / RECORD).read_bytes()
    return record if record is not None and json_bytes(record) == raw else None


def _small_digest(path: Path) -> str | None:
    """None for what is too large to be a small file."""
    with path.open("rb") as file:
        data = file.read(MAX_INDEX_BYTES + 1)
    return digest_of(data) if len(data) <= MAX_INDEX_BYTES else None


def _weights(folder: Path, record: Mapping[str, Any], plain: set[str], indexes: list[str]) -> set[str]:
    """The weights that the record is about; none of them where headers do not give the recorded digest."""
    tensors: Mapping[str, str] = record["digests"]["tensors"]
    named = _named(folder / indexes[0]) if indexes else {name for name in plain if name.endswith(".safetensors")}
    headers = {name: header for name in sorted(plain & named) if (header := _header(folder, name)) is not None}
    shards = record["digests"].get("shards")
    if not indexes and isinstance(shards, list) and len(shards) > 1:  # of a calibration
        headers = {name: header for name, header in headers.items() if name in shards}
    elif not indexes:  # one file then; a second that says the same of itself makes the number of tensors wrong
        headers = {name: header for name, header in headers.items() if header.tensors.keys() == tensors.keys()}
    infos = [info for header in headers.values() for info in header.tensors.values()]
    now = headers_digest(infos, [header.metadata for header in headers.values()])
    if len(infos) != len(tensors) or now != record["digests"].get("headers"):
        return set()
    return {name for name, header in headers.items() if _has_bytes(folder / name, header, tensors)}


def _named(index: Path) -> set[str]:
    try:
        shards = parse_json_object(index.read_bytes(), code="index", path=str(index)).get("weight_map")
    except InputError:
        return set()
    return {str(name) for name in shards.values()} if isinstance(shards, dict) else set()


def _header(folder: Path, name: str) -> Header | None:
    """None for what is no safetensors file."""
    try:
        file = LocalFile(folder, name)
    except InputError as error:
        _refuse_unread(error)
        return None
    try:
        length = read_header_length(file.read(0, PREFIX_BYTES), file=name, file_bytes=file.num_bytes)
        return parse_header(file.read(PREFIX_BYTES, length), file=name, file_bytes=file.num_bytes)
    except InputError as error:
        _refuse_unread(error)
        return None
    finally:
        file.close()


def _has_bytes(path: Path, header: Header, digests: Mapping[str, str]) -> bool:
    """Whether a file holds the recorded bytes."""
    spans = tuple((name, info.start, info.num_bytes) for name, info in header.tensors.items())
    found = _digests(path, _state(path), spans)
    return found is not None and all(found[name] == digests.get(name) for name in found)


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# OUT is looked at when a run begins and again once it holds OUT: what did not change is not read twice.
@functools.lru_cache(maxsize=4096)
def _digests(path: Path, _state: tuple[int, ...], spans: tuple[tuple[str, int, int], ...]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    try:
        file = LocalFile(path.parent, path.name)
        try:
            for name, start, num_bytes in spans:
                digest = xxhash.xxh3_128()
                for begin in range(start, start + num_bytes, _READ_BYTES):
                    digest.update(file.read(begin, min(_READ_BYTES, start + num_bytes - begin)))
                found[name] = digest.hexdigest()
        finally:
            file.close()
    except InputError as error:
        _refuse_unread(error)
        return None
    return found


def _refuse_unread(error: InputError) -> None:
    """What a disk cannot give is not for that reason somebody else's.

    Raises:
        OSError: The disk failed, and the file is not what is wrong.
    """
    if isinstance(error.__cause__, OSError):
        raise error.__cause__
