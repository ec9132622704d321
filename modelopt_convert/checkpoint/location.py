"""Where inputs lie: on disk, or on the Hub where that is written ``hf://``. No torch.

A name that is not on disk is an error, never a guess at a repo.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from modelopt_convert.checkpoint.hub.client import NOT_CACHED
from modelopt_convert.checkpoint.hub.hub_path import PREFIX, HubPath, parse_hub_path
from modelopt_convert.checkpoint.local_file import LocalFile

Location = Path | HubPath


class OpenFile(Protocol):
    """An opened file, near or far."""

    @property
    def where(self) -> str:
        """Its name in messages."""

    @property
    def num_bytes(self) -> int:
        """Its size when it was opened."""

    @property
    def fetched(self) -> int:
        """Bytes that came over the network so far."""

    @property
    def requests(self) -> int:
        """How many ranges were asked for."""

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes from ``offset``; a MoptError if they cannot be had."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset``; a MoptError if they cannot be had."""

    def fileno(self) -> int | None:
        """Its descriptor; None if it is far."""

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say that ranges (begin, end) will be read soon."""

    def unfetched(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Bytes that reading ``ranges`` would bring over the network."""

    def check_unchanged(self) -> None:
        """Raise an InputError if the file is not the one that was opened."""

    def close(self) -> None:
        """Close the file; closing a file on the Hub keeps what was fetched."""


def parse_location(text: str, *, download: bool = False) -> Location:
    """What the user named.

    Args:
        text: A path, or ``hf://ORGANIZATION/NAME[@REVISION][/PATH]``.
        download: Whether files on the Hub are fetched whole, into the Hub's cache.

    Raises:
        InputError: ``hub.uri``.
    """
    return parse_hub_path(text, download=download) if text.startswith(PREFIX) else Path(text)


def open_file(folder: Location, name: str) -> OpenFile:
    """Open a file of a checkpoint.

    Raises:
        MoptError: With an ``input.*`` or ``hub.*`` code.
    """
    if isinstance(folder, HubPath):
        return folder.repo.open((folder / name).path)
    return LocalFile(folder, name)


def read_small(location: Location, limit: int) -> bytes:
    """The first ``limit`` bytes of a small file.

    Raises:
        OSError: It is on disk and cannot be read.
        MoptError: With a ``hub.*`` code.
    """
    if isinstance(location, Path):
        with location.open("rb") as file:
            return file.read(limit)
    remote = location.repo.open(location.path)
    try:
        return remote.read(0, min(limit, remote.num_bytes))
    finally:
        remote.close()


def is_dir(location: Location) -> bool:
    """Whether it is a folder; also of a name that no file system takes."""
    try:
        return location.is_dir()
    except OSError:
        return False


def names(folder: Location) -> list[str]:
    """Names of what a folder holds; none if there is no such folder."""
    if isinstance(folder, HubPath):
        return folder.names()
    return [path.name for path in folder.glob("*")]


def hint_if_missing(location: Location, hint: str) -> str:
    """What to do where something is not found; without the network it may lie on the Hub all the same.

    Args:
        location: The place where something was looked for.
        hint: What to do if it is really not there.
    """
    offline = isinstance(location, HubPath) and location.repo.offline
    return f"the cache may hold a part only: {NOT_CACHED}" if offline else hint


def on_disk(file: Location) -> Path:
    """The path of a file on disk; a file on the Hub is fetched whole, into the Hub's cache.

    Raises:
        MoptError: With a ``hub.*`` code.
    """
    return file.repo.fetch(file.path) if isinstance(file, HubPath) else file


def local_path(location: Location | None) -> Path | None:
    """The path of a location on disk; None for a location on the Hub."""
    return location if isinstance(location, Path) else None
