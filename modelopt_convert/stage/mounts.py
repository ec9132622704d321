"""Where folders really lie, by the kernel's table of mounts: one folder can have several names. No torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table.

    Attributes:
        number: The number by which an open file names the mount that it was opened through.
        device: The file system's device, the same for all its mounts.
        root: The folder of the file system that is mounted; not ``/`` for a bind mount of a folder.
        point: The folder at which it is mounted.
        kind: The file system's type.
    """

    number: int
    device: str
    root: Path
    point: Path
    kind: str


@dataclass(frozen=True, slots=True)
class Place:
    """A folder by its file system and its path in that file system, the same under every name."""

    device: str
    path: Path

    def holds(self, other: "Place") -> bool:
        """Whether ``other`` is this place or lies in it."""
        return self.device == other.device and other.path.is_relative_to(self.path)


def mount_table() -> list[Mount]:
    """Every mount that this process can see, in the order in which they were made."""
    # Bytes: the kernel escapes blank, tab, newline and backslash, and no other character at which text may be split.
    raw = Path("/proc/self/mountinfo").read_bytes()
    return [_parse(line) for line in raw.split(b"\n") if line]


def place_of(path: Path, table: list[Mount]) -> Place | None:
    """Where an existing path really lies; None if it was opened through a mount that the table does not show."""
    fd = os.open(path, os.O_PATH)
    try:
        told = Path(f"/proc/self/fdinfo/{fd}").read_bytes()
    finally:
        os.close(fd)
    number = int(re.findall(rb"^mnt_id:\s*(\d+)$", told, re.MULTILINE)[0])
    real = path.resolve()
    mount = next((one for one in table if one.number == number), None)
    if mount is None or not real.is_relative_to(mount.point):
        return None
    return Place(mount.device, mount.root / real.relative_to(mount.point))


def places_below(path: Path, table: list[Mount]) -> list[Place]:
    """The place of an existing path, and of every mount below it: all that is reached by going down from there."""
    real = path.resolve()
    own = place_of(path, table)
    mounted = [Place(one.device, one.root) for one in table if one.point != real and one.point.is_relative_to(real)]
    return [*([own] if own is not None else []), *mounted]


def is_mounted_below(path: Path) -> bool:
    """Whether something is mounted inside an existing folder: to remove the folder would empty that too."""
    real = path.resolve()
    return any(one.point != real and one.point.is_relative_to(real) for one in mount_table())


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at a path, also a single file."""
    return any(one.point == path for one in mount_table())


def _parse(line: bytes) -> Mount:
    fields, _, rest = line.partition(b" - ")
    number, _, device, root, point = fields.split(b" ")[:5]
    return Mount(
        int(number), device.decode("ascii"), _unescape(root), _unescape(point), os.fsdecode(rest.split(b" ")[0])
    )


def _unescape(raw: bytes) -> Path:
    """A path of the table, in which blanks and the like are written in octal."""
    return Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), raw)))
