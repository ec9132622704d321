"""A disk that loses power: from a recorded trace, every state in which it may be found afterwards. No torch.

The disk is a set of inodes: files with data and a size, folders with names. A call changes the running system at once,
but reaches the disk in effects that each arrive whole or not at all, in any order, until the fsync of their inode. This
is what POSIX leaves open, and less than ext4 or XFS give: those keep the order of renames, for instance. Only a rename
and an exchange within one folder are taken to be atomic, as on every file system that mopt is for.
"""

import functools
import itertools
import random
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fs_trace import Event

ALL_SUBSETS = 12  # of as many effects; of more, 2^12 subsets by chance
ROOT = 0
Entry = tuple[str, bytes | None, int]  # path, content (None for a folder), mode
Spans = tuple[tuple[int, bytes], ...]


class Inode(NamedTuple):
    """What the disk, or the running system, holds under one number."""

    folder: bool
    mode: int
    names: Mapping[str, int | None]
    size: int = 0
    spans: Spans = ()


Disk = Mapping[int, Inode]


@dataclass(frozen=True, slots=True)
class Effect:
    """One change of one inode: some of its names at once, a piece of its data, its size or its mode."""

    inode: int
    names: tuple[tuple[str, int | None], ...] = ()
    span: tuple[int, bytes] | None = None
    size: int | None = None
    mode: int | None = None


def changed(disk: Disk, effects: Iterable[Effect]) -> dict[int, Inode]:
    """The disk after these effects; a later one of the same thing wins."""
    result = dict(disk)
    for effect in effects:
        folder, mode, names, size, spans = result[effect.inode]
        result[effect.inode] = Inode(
            folder,
            mode if effect.mode is None else effect.mode,
            {**names, **dict(effect.names)} if effect.names else names,
            size if effect.size is None else max(size, effect.size),
            spans if effect.span is None else (*spans, effect.span),
        )
    return result


@functools.cache
def content(size: int, spans: Spans) -> bytes:
    """A file's bytes: zeros where the data did not arrive, cut off where the size did not."""
    data = bytearray(size)
    for offset, piece in spans:
        piece = piece[: max(size - offset, 0)]
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def listing(disk: Disk, number: int = ROOT, prefix: str = "") -> list[Entry]:
    """Everything that can be reached by name, parents before children."""
    found: list[Entry] = []
    for name, child in sorted(disk[number].names.items()):
        if child is None:
            continue
        inode, path = disk[child], f"{prefix}{name}"
        if inode.folder:
            found += [(path, None, inode.mode), *listing(disk, child, f"{path}/")]
        else:
            found.append((path, content(inode.size, inode.spans), inode.mode))
    return found


def lay_out(disk: Disk, place: Path) -> None:
    """Make a real folder of it, in the place of what is there."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path, data, mode in listing(disk):
        if data is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(data)
        if stat.S_IMODE((place / path).stat().st_mode) != mode:
            (place / path).chmod(mode)


def found_in(place: Path) -> list[Entry]:
    """The same listing of a real folder."""
    entries: list[Entry] = []
    for path in place.rglob("*"):
        data = None if path.is_dir() else path.read_bytes()
        entries.append((path.relative_to(place).as_posix(), data, stat.S_IMODE(path.stat().st_mode)))
    return sorted(entries)


def read_disk(place: Path) -> Disk:
    """A disk with what stands in a real folder."""
    model = PowerLoss({ROOT: Inode(True, 0, {})})
    for path, data, mode in found_in(place):
        model.apply(Event("mkdir" if data is None else "create", path, "", number=mode))
        if data is not None:
            model.apply(Event("write", path, "", data=data))
    return model.now


def visible(disk: Disk) -> tuple[object, ...]:
    """What recovery can tell apart: of a stage it sees only names, since all it does with one is to remove it.

    Of a marker it sees no more, but for the names of copies: test_directory_planted.py.
    """
    return tuple(
        (path, _names_copies(data), mode) if _in_stage(path) else (path, data, mode)
        for path, data, mode in listing(disk)
    )


class PowerLoss:
    """Follows a trace; ``disks`` are the states in which the disk may be found if the power goes now.

    Attributes:
        now: What the running system sees.
        synced: What is certainly on the disk.
        pending: What may be there too.
    """

    def __init__(self, disk: Disk) -> None:
        """All of this is on disk."""
        self.now = self.synced = disk
        self.pending: list[Effect] = []

    def apply(self, event: Event) -> None:
        """One call of the running system."""
        parent, name = self._at(event.path)
        match event.op:
            case "mkdir" | "create":
                number = len(self.now)
                made = {number: Inode(event.op == "mkdir", event.number, {})}
                self.now, self.synced = {**self.now, **made}, {**self.synced, **made}
                self._do(Effect(parent, ((name, number),)))
            case "allocate":
                self._do(Effect(self._number(event.path), size=event.number))
            case "write":
                number = self._number(event.path)
                self._do(Effect(number, span=(event.offset, event.data)))
                end = event.offset + len(event.data)
                if end > self.now[number].size:
                    self._do(Effect(number, size=end))
            case "chmod":
                self._do(Effect(self._number(event.path), mode=event.number))
            case "rename" | "exchange":
                folder, other = self._at(event.target)
                assert folder == parent, "a rename from one folder to another has no place in this model"
                names = self.now[parent].names
                back = names.get(other) if event.op == "exchange" else None
                self._do(Effect(parent, ((name, back), (other, names[name]))))
            case "unlink" | "rmdir":
                self._do(Effect(parent, ((name, None),)))
            case "fsync":
                number = self._number(event.path)
                self.synced = changed(self.synced, [one for one in self.pending if one.inode == number])
                self.pending = [one for one in self.pending if one.inode != number]
            case _:
                raise AssertionError(event.op)

    def disks(self, seed: int) -> Iterator[Disk]:
        """Every subset of what is pending; beyond 2^12 that many, with all that lack or have a single effect."""
        exposed = self._exposed()
        sure = [one for one in self.pending if one.names == () and one.inode not in exposed]
        open_ = [one for one in self.pending if one.names or one.inode in exposed]
        synced = changed(self.synced, sure)
        for mask in _masks(len(open_), seed):
            yield changed(synced, [one for place, one in enumerate(open_) if mask >> place & 1])

    def _do(self, effect: Effect) -> None:
        self.now = changed(self.now, [effect])
        self.pending = [*self.pending, effect]

    def _at(self, path: str) -> tuple[int, str]:
        where = PurePosixPath(path)
        return self._number(str(where.parent)), where.name

    def _number(self, path: str) -> int:
        number = ROOT
        for name in PurePosixPath(path).parts:
            found = self.now[number].names[name]
            assert found is not None, path
            number = found
        return number

    def _exposed(self) -> set[int]:
        """Inodes that some state may show outside a stage, and markers that name copies; nobody looks at other data."""
        names: dict[int, set[tuple[str, int]]] = {}
        for number, inode in self.synced.items():
            names[number] = {(name, child) for name, child in inode.names.items() if child is not None}
        for effect in self.pending:
            names[effect.inode] |= {(name, child) for name, child in effect.names if child is not None}
        found = {child for name, child in names[ROOT] if not _in_stage(name)}
        found |= {one.inode for one in self.pending if one.span is not None and _names_copies(one.span[1])}
        new = found
        while new:
            new = {child for number in new for _, child in names[number]} - found
            found |= new
        return found


def _names_copies(data: bytes | None) -> bool:
    return data is not None and b'"copies": ["' in data and data.endswith(b"]}")


def _in_stage(path: str) -> bool:
    top = path.partition("/")[0]
    return ".mopt-stage-" in top or ".mopt-mark-" in top


def _masks(count: int, seed: int) -> Iterable[int]:
    if count <= ALL_SUBSETS:
        return range(1 << count)
    full = (1 << count) - 1
    single = [1 << place for place in range(count)]
    chance = random.Random(seed)
    drawn = (chance.getrandbits(count) for _ in range(1 << ALL_SUBSETS))
    return dict.fromkeys(itertools.chain([0, full], single, (full ^ one for one in single), drawn))
