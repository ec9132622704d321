"""One pass over every byte: digests against the record in mopt.json, and values that are not finite."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from operator import truediv
from pathlib import Path
from threading import Event
from typing import Any

import xxhash

from modelopt_convert.checkpoint.companions import folders_of
from modelopt_convert.checkpoint.digests import headers_digest
from modelopt_convert.checkpoint.location import Location, OpenFile, is_there, names, open_file
from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES, CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, copied_files, parts_of
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.finite import FiniteWatch, NotFinite, check_e4m3
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import in_order, until

_SCANNED_BYTES = 1 << 22  # more than a core's cache holds: with many workers the calls for a piece cost more than that
_WEIGHTS = (
    *(".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".pkl", ".pickle", ".onnx", ".msgpack", ".npz", ".h5", "hf_quant_config.json"),
)
# The card is the user's to edit.
_EDITABLE = frozenset({"README.md"})


@dataclass(slots=True)
class Scanned:
    """What the pass found.

    Attributes:
        failures: Tensors and files that are not those recorded, in words.
        warnings: Files that may differ.
        edited: Of those recorded, the ones that do.
        broken: E4M3 weights that hold NaN, with the message.
        not_finite: NaN and infinity among unquantized values, by tensor; only where there are any.
    """

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    not_finite: dict[str, NotFinite] = field(default_factory=dict)


def scan(
    reader: CheckpointReader,
    record: Mapping[str, Any] | None,
    workers: int,
    advance: Callable[[int], None],
    *,
    is_compared: bool = False,
) -> Scanned:
    """Read what has to be read: all bytes with a record, else E4M3 weights, and unquantized tensors with a base.

    Args:
        reader: The opened checkpoint.
        record: Its mopt.json, or None.
        workers: Tensors read at a time.
        advance: Called with the number of bytes just read.
        is_compared: Whether there is a base, for which unquantized tensors are read in any case.
    """
    found = Scanned()
    digests: Mapping[str, str] = record["digests"]["tensors"] if record is not None else {}

    def read(name: str, stopped: Event) -> str | None:
        """What is wrong with the bytes of a tensor."""
        digest, coded, info = xxhash.xxh3_128(), name in weights, reader.tensors[name]
        watch = FiniteWatch(info.dtype, info.shape) if info.dtype in HALF_AND_FLOAT else None
        for chunk in until(stopped, reader.buffered(name, _SCANNED_BYTES)):
            digest.update(chunk)
            if watch is not None:
                watch.add(chunk)
            if coded and name not in found.broken:
                try:
                    check_e4m3(chunk)
                except ValueError as error:
                    found.broken[name] = str(error)
            advance(len(chunk))
        if watch is not None and (odd := watch.found()) is not None:
            found.not_finite[name] = odd
        if record is not None and name not in digests:
            return f"tensor {name!r} is not recorded"
        if record is not None and digest.hexdigest() != digests[name]:
            return f"tensor {name!r} is not what was proven: its bytes changed"
        return None

    weights = {name for name, one in reader.tensors.items() if one.dtype == "F8_E4M3" and name.endswith(".weight")}
    floats = {name for name, one in reader.tensors.items() if is_compared and one.dtype in HALF_AND_FLOAT}
    due_tensors = [name for name in reader.tensors if record is not None or name in weights or name in floats]
    reader.prefetch((name, 0, reader.tensors[name].num_bytes) for name in due_tensors)
    found.failures += [words for words in in_order(due_tensors, read, workers) if words is not None]
    found.broken = {name: found.broken[name] for name in due_tensors if name in found.broken}
    found.not_finite = {name: found.not_finite[name] for name in due_tensors if name in found.not_finite}
    found.failures += [f"tensor {name!r} is recorded and gone" for name in digests if name not in reader.tensors]
    if record is not None:
        found.failures += _header_faults(reader, record) + _name_faults(reader, record)
        # ComfyUI's files have no config.json, nor has what mopt made of one file.
        due = {*(["config.json"] if is_there(reader.folder / "config.json") else []), *reader.indexes}
        found.failures += [f"file {name} is not recorded" for name in sorted(due - record["digests"]["files"].keys())]
    known = {RECORD, *(record["digests"]["files"] if record is not None else ())}
    failures, warnings = unlisted(reader.folder, set(reader.skipped) - known)
    found.failures += failures
    found.warnings += warnings if record is not None else []
    files: Mapping[str, str] = record["digests"]["files"] if record is not None else {}
    for name, wanted in files.items():
        # Only what the folder lists: a name of the record may be any text.
        there = name in {"config.json", *reader.skipped, *reader.indexes}
        if not there or _digest(reader.folder, name) != wanted:
            is_editable = name in _EDITABLE
            found.edited += [name] * is_editable
            list_ = found.warnings if is_editable else found.failures
            list_.append(f"file {name} is not what was recorded")
    return found


def unlisted(folder: Location, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """What is wrong with names in a folder that nothing lists, and what is only to be told.

    A folder below is looked through, unless its name has a dot first, as those of git and of downloads have.
    """
    failures, warnings = [], []
    for name in sorted(names):
        inside = [name]
        if not name.startswith(".") and isinstance(folder, Path):
            inside += sorted(str(path.relative_to(folder)) for path in (folder / name).rglob("*"))
        weights = [one for one in inside if one.lower().endswith(_WEIGHTS)]
        failures += [f"file {one} is not recorded, and a loader may take it" for one in weights]
        if not weights and not name.startswith("."):
            warnings.append(f"{name} is not recorded")
    return failures, warnings


def beside_faults(root: Location, record: Mapping[str, Any], workers: int, progress: Progress) -> list[str]:
    """What stands beside the transformers of a checkpoint and is not what its record says, in words.

    Args:
        root: The folder above the transformers.
        record: Its mopt.json.
        workers: Files read at a time.
        progress: Told what is read.

    Raises:
        InputError: ``input.unreadable``, ``input.too_many_files``: nothing is known of the bytes.
    """
    copied = copied_files(record)
    digests = record.get("digests")
    files = digests.get("files") if isinstance(digests, dict) else None
    small = {name: str(one) for name, one in files.items()} if isinstance(files, dict) else {}
    faults = [
        f"file {name} is not what was recorded"
        for name, wanted in small.items()
        if name not in _EDITABLE and "/" not in name and _digest(root, name) != wanted
    ]
    if "copied" in record and record["copied"] != copied:
        faults.append("mopt.json: `copied` is not what mopt writes")
    faults += _copied_faults(root, copied, workers, progress)
    tops = {path.partition("/")[0] for path in copied} | {RECORD, *_EDITABLE, *small, *parts_of(record)}
    failures, _ = unlisted(root, set(names(root)) - tops)
    faults += failures
    for folder in folders_of(copied):
        known = {path.removeprefix(f"{folder}/").partition("/")[0] for path in copied if path.startswith(f"{folder}/")}
        failures, _ = unlisted(_below(root, folder), set(names(_below(root, folder))) - known)
        faults += [f"{folder}/: {words}" for words in failures]
    return faults


def _copied_faults(root: Location, copied: Mapping[str, str], workers: int, progress: Progress) -> list[str]:
    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        faults: list[str] = []
        for path in copied:
            folder, _, name = path.rpartition("/")
            file = _open(_below(root, folder), name)
            if file is None:
                faults.append(f"{path} was copied and is gone")
            else:
                stack.callback(file.close)
                files[path] = file

        def changed(path: str, stopped: Event) -> str | None:
            file, digest = files[path], xxhash.xxh3_128()
            file.prefetch([(0, file.num_bytes)])
            for begin in until(stopped, range(0, file.num_bytes, _SCANNED_BYTES)):
                piece = file.read(begin, min(_SCANNED_BYTES, file.num_bytes - begin))
                digest.update(piece)
                progress.advance(len(piece))
            return None if digest.hexdigest() == copied[path] else f"{path} is not what was copied: its bytes changed"

        if files:
            progress.begin("read copies", sum(one.num_bytes for one in files.values()))
        return faults + [words for words in in_order(list(files), changed, workers) if words is not None]


def _below(root: Location, folder: str) -> Location:
    return reduce(truediv, folder.split("/"), root) if folder else root


def _digest(folder: Location, name: str) -> str | None:
    """Of a small file; None for what is none."""
    if (file := _open(folder, name)) is None:
        return None
    try:
        return xxhash.xxh3_128_hexdigest(file.read(0, min(file.num_bytes, MAX_INDEX_BYTES)))
    finally:
        file.close()


def _open(folder: Location, name: str) -> OpenFile | None:
    """None for what is no file: the record may name a pipe that nobody writes to.

    Raises:
        InputError: ``input.unreadable``, ``input.too_many_files``: nothing is known of its bytes.
    """
    try:
        return open_file(folder, name)
    except InputError as error:
        if error.code in ("input.unreadable", "input.too_many_files"):
            raise
        return None


def _header_faults(reader: CheckpointReader, record: Mapping[str, Any]) -> list[str]:
    """The same bytes under another shape, dtype or metadata are another tensor."""
    if record["digests"].get("headers") != headers_digest(reader.tensors.values(), reader.metadata.values()):
        return ["a header is not what was recorded: dtypes, shapes or metadata changed"]
    return []


def _name_faults(reader: CheckpointReader, record: Mapping[str, Any]) -> list[str]:
    """Loaders find weights by the names of their files. Records by an older mopt do not have them."""
    recorded, files = record["digests"].get("shards", list(reader.files)), list(reader.files)
    if recorded != files:
        return [f"weight files: expected {recorded!r:.200}, as recorded, found {files!r:.200}"]
    return []
