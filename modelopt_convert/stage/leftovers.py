"""What a killed run can leave beside OUT, and the marker by which the next run knows that mopt left it. No torch.

A stage is ``.OUT.mopt-stage-ID``, an old tree between two renames ``.OUT.mopt-old-ID``, and their marker the file
``.OUT.mopt-mark-ID``. A folder of such a name without the marker is somebody else's, unless it is empty.
"""

import ctypes
import json
import os
import re
import stat
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelopt_convert.checkpoint.companions import MODEL_INDEX, folders_of
from modelopt_convert.stage.ownership import Entry, Standing, Tree, look

Kind = Literal["stage", "old", "mark"]
_SCHEMA = "mopt.stage/1"
_HEAD = f'{{"schema": "{_SCHEMA}"'.encode()
_MAX_BYTES = 1 << 28
_AT_FDCWD, _NO_FOLLOW, _BIRTH = -100, 0x100, 0x800  # of statx(2)
_STATX, _STATX_BYTES = struct.Struct("=I76xqI"), 256  # stx_mask and stx_btime
# What a stage holds while it is written, by whichever executor.
_FILE = rf"{re.escape(MODEL_INDEX)}|config\.json|mopt\.json|README\.md|[^/]+\.safetensors(\.index\.json)?"
_STAGED = re.compile(rf"(transformer(_2)?/)?({_FILE})|transformer(_2)?|attempts(/[0-9a-f]{{16}})?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Marker:
    """What mopt noted of a run before it wrote anything.

    Attributes:
        replaces: Which folder the OUT was that was to be replaced, if one was.
        tree: What that OUT held; None if the power went before that was on disk.
        copies: Paths of files that come from the base's pipeline, and may have any name.
        number: The ID of the run, as in the marker's own name: a copy of the marker says nothing of other folders.
        stage: Which folder the stage is; None if the power went before that was on disk.
    """

    replaces: tuple[int, int] | None = None
    tree: Tree | None = None
    copies: frozenset[str] = frozenset()
    number: str = ""
    stage: tuple[int, int] | None = None

    def to_bytes(self) -> bytes:
        """As it is written to disk."""
        tree = {name: [one.kind, one.num_bytes, one.changed_ns] for name, one in (self.tree or {}).items()}
        told = {"schema": _SCHEMA, "id": self.number, "stage": self.stage, "replaces": self.replaces, "tree": tree}
        return json.dumps(told | {"copies": sorted(self.copies)}).encode()

    def is_whole(self, old: Path) -> bool:
        """Whether nothing was removed of an old tree since it was OUT."""
        return self.is_of(old) and look(old).keys() >= (self.tree or {}).keys()

    def is_of(self, folder: Path) -> bool:
        """Whether a folder is the very one that the run made or replaced: anybody can give another its name."""
        return self.stage is None or identity_of(folder) in (self.stage, self.replaces)

    def strangers(self, folder: Path, *, replaced: bool) -> list[str]:
        """What somebody put into a folder that is to be removed.

        Args:
            folder: A stage, or an old tree.
            replaced: Whether it is known to be the old tree, which holds nothing but what it held.
        """
        held = self.tree or {}
        copied = {*self.copies, *folders_of(self.copies)}
        old = self.tree is not None and (replaced or identity_of(folder) == self.replaces)
        return [
            name
            for name, entry in sorted(look(folder).items())
            if held.get(name) != entry and (old or not _is_staged(name, entry, copied))
        ]


def marker_of(standing: Standing | None, output: Path, copies: Iterable[str], number: str) -> Marker:
    """The marker of a run whose stage is made, that replaces this, or nothing, and copies files to these paths."""
    stage = identity_of(beside(output, "stage", number))
    if standing is None:
        return Marker(None, {}, frozenset(copies), number, stage)
    return Marker(identity_of(output), standing.tree, frozenset(copies), number, stage)


def left_beside(output: Path, kind: Kind) -> Mapping[str, Path]:
    """What runs to this OUT left, by the ID of the run; mopt makes no links."""
    pattern = re.compile(rf"{re.escape(f'.{output.name}.mopt-{kind}-')}([0-9a-f]{{8}})")
    # glob would take a folder that may not be listed for an empty one.
    found = {name: match[1] for name in sorted(os.listdir(output.parent)) if (match := pattern.fullmatch(name))}
    is_ours = Path.is_file if kind == "mark" else Path.is_dir
    paths = {number: output.parent / name for name, number in found.items()}
    return {number: path for number, path in paths.items() if is_ours(path) and not path.is_symlink()}


def beside(output: Path, kind: Kind, number: str) -> Path:
    """The path of what a run leaves."""
    return output.parent / f".{output.name}.mopt-{kind}-{number}"


def read_marker(path: Path) -> Marker | None:
    """A marker that mopt wrote, also one whose writing a power cut cut short; None for anything else."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            return None
        raw = path.read_bytes()
    except OSError:
        return None
    if raw.strip(b"\0") and raw[: len(_HEAD)] != _HEAD[: len(raw)]:  # zeros: the power went before the data came
        return None
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        return Marker()
    found = _parsed(told)
    return found if found is not None and path.name.endswith(f"-{found.number}") else None


def identity_of(folder: Path) -> tuple[int, int]:
    """Which folder it is, whatever its path: its inode, and when that was made, since inodes are used again.

    Not its device: what lies beside OUT lies on OUT's, and that may have another number after a restart.
    """
    told = ctypes.create_string_buffer(_STATX_BYTES)
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)  # glibc 2.28 and newer
    born = 0
    if statx is not None and statx(_AT_FDCWD, os.fsencode(folder), _NO_FOLLOW, _BIRTH, told) == 0:
        mask, seconds, nanoseconds = _STATX.unpack_from(told)
        born = seconds * 10**9 + nanoseconds if mask & _BIRTH else 0  # not every file system notes it
    return folder.lstat().st_ino, born


def _parsed(told: Any) -> Marker | None:
    """The marker that whole JSON says; None where mopt would not have said so."""
    stage, replaces, tree, copies, number = (told.get(key) for key in ("stage", "replaces", "tree", "copies", "id"))
    if not _are_numbers(stage, 2) or (replaces is not None and not _are_numbers(replaces, 2)):
        return None
    if not isinstance(tree, dict) or not all(_are_numbers(words, 3) for words in tree.values()):
        return None
    if not isinstance(copies, list) or not all(isinstance(one, str) for one in (*copies, number)):
        return None
    entries = {name: Entry(*words) for name, words in tree.items()}
    known = (replaces[0], replaces[1]) if replaces is not None else None
    return Marker(known, entries, frozenset(copies), number, (stage[0], stage[1]))


def _are_numbers(found: object, count: int) -> bool:
    return isinstance(found, list) and len(found) == count and all(type(one) is int for one in found)


def _is_staged(name: str, entry: Entry, copied: Collection[str]) -> bool:
    is_known = name in copied or _STAGED.fullmatch(name) is not None
    return entry.kind in (stat.S_IFREG, stat.S_IFDIR) and is_known
