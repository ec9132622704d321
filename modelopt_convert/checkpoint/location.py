"""Where inputs lie: on disk, or in a storage that the prefix names, as ``hf://`` does the Hub. No torch.

A name that is not on disk is an error, never a guess at a repo.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, Self

from modelopt_convert.checkpoint.hub import hub_path, provenance
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.run.errors import InputError


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
        """Close the file; what was fetched of a far one is kept."""


class FarPath(Protocol):
    """A folder or file of a storage that is read over the network, with the methods of ``Path`` that inputs need."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    @property
    def parent(self) -> Self:
        """The folder in which this lies."""

    def __truediv__(self, name: str) -> Self:
        """What lies in this folder."""

    def is_file(self) -> bool:
        """Whether the storage has such a file."""

    def is_dir(self) -> bool:
        """Whether the storage has files below it."""

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted."""

    def open(self) -> OpenFile:
        """Open the file; a MoptError if it cannot be had."""

    def fetch(self) -> Path:
        """The file on disk, fetched whole; a MoptError if it cannot be had."""

    def identity(self) -> dict[str, str]:
        """What identifies what is read: ``origin``, which is the storage's name, ``repo`` and ``commit``."""

    def download_command(self) -> str:
        """The command that makes a folder on disk of what is read."""

    def absence(self) -> str | None:
        """Why what is not found here may be there all the same, and what to do; None if it is not there."""


class Storage(Protocol):
    """How a place in a storage is understood."""

    def __call__(self, text: str, *, download: bool) -> FarPath:
        """What the user named; files are fetched whole with ``download``. An InputError if the text names nothing."""


Location = Path | FarPath
NO_FOLDER = "no such folder"
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")
_STORAGES: Mapping[str, Storage] = {hub_path.PREFIX: hub_path.parse_hub_path}


def is_far(place: str | Path) -> bool:
    """Whether a place is written as one in a storage; a Path has made one slash of the prefix's two."""
    return f"{str(place).partition('/')[0]}//" in _STORAGES


def parse_location(text: str, *, download: bool = False) -> Location:
    """What the user named.

    Args:
        text: A path, or one in a storage, such as ``hf://ORGANIZATION/NAME[@REVISION][/PATH]``.
        download: Whether files in a storage are fetched whole, into its cache.

    Raises:
        InputError: With the storage's code, such as ``hub.uri``.
    """
    parse = next((parse for prefix, parse in _STORAGES.items() if text.startswith(prefix)), None)
    return Path(text) if parse is None else parse(text, download=download)


def as_written(place: Location) -> str:
    """A place as the user wrote it: a Path has made one slash of the several in an address."""
    slashes = {"file": "///"}
    return _ADDRESS.sub(lambda found: f"{found[1]}:{slashes.get(found[1], '//')}{found[2]}", str(place))


def foreign_address(place: Location) -> tuple[str, str] | None:
    """What kind of address mopt does not read, and what to do; None for a path, or a place in a storage.

    Args:
        place: What the user named.
    """
    text = str(place)
    if _WINDOWS.match(text):
        return "a Windows path", "give the path as this system has it, with /; in WSL C:\\ is /mnt/c"
    found = _ADDRESS.match(text)
    if found is None or is_far(text):
        return None
    scheme, rest = found.groups()
    if scheme == "file":
        return "a file: address", f"give the path alone: /{rest}"
    if scheme not in ("http", "https"):
        return f"an address ({scheme}:), which mopt does not reach", "give a path on disk"
    return "a web address, which mopt does not open", "give a path on disk"


def open_file(folder: Location, name: str) -> OpenFile:
    """Open a file of a checkpoint.

    Raises:
        MoptError: With an ``input.*`` or ``hub.*`` code.
    """
    return LocalFile(folder, name) if isinstance(folder, Path) else (folder / name).open()


def read_small(location: Location, limit: int, *, code: str) -> bytes:
    """All of a small file.

    Args:
        location: The file; a link may only lead to where those of checkpoints do.
        limit: Bytes that it may have.
        code: Prefix of the error code: ``<code>.too_large``.

    Raises:
        InputError: There are more bytes.
        MoptError: With an ``input.*`` or ``hub.*`` code.
        OSError: The disk failed.
    """
    file = open_file(location.parent, location.name)
    try:
        if file.num_bytes > limit:
            raise InputError(
                f"{file.where}: expected at most {limit} bytes, found {file.num_bytes}",
                code=f"{code}.too_large",
                path=file.where,
                hint="no such file is so large: check that it is the right one; export or download it again",
            )
        return file.read(0, file.num_bytes)
    finally:
        file.close()


def is_there(location: Location) -> bool:
    """Whether anything has the name, were it a folder, a pipe or a link to nothing."""
    return os.path.lexists(location) if isinstance(location, Path) else location.is_file()


def fault_of_folder(location: Location) -> str | None:
    """Why it cannot be looked into: it is not there, or what the system says; None if it is a folder."""
    try:
        if isinstance(location, Path):
            location.stat()  # is_dir() would call a loop of links absent
        return None if location.is_dir() else NO_FOLDER
    except (FileNotFoundError, NotADirectoryError):
        return NO_FOLDER
    except OSError as error:
        return error.strerror


def is_file(location: Location) -> bool:
    """Whether it is a file; also of a name that no file system takes."""
    try:
        return location.is_file()
    except OSError:
        return False


def names(folder: Location) -> list[str]:
    """Names of what a folder holds; none if there is no such folder."""
    return [path.name for path in folder.glob("*")] if isinstance(folder, Path) else folder.names()


def check_name(folder: Location, name: str) -> None:
    """Refuse a name that no JSON can hold: a record with it could not be read again.

    Raises:
        InputError: ``input.name``.
    """
    plain = name.encode(errors="backslashreplace").decode()
    if plain != name:
        raise InputError(
            f"{folder}: {plain!r} is not a UTF-8 file name",
            code="input.name",
            path=str(folder),
            hint="rename the file",
        )


def hint_if_missing(location: Location, hint: str) -> str:
    """What to do where something is not found; without the network a storage may have it all the same.

    Args:
        location: The place where something was looked for.
        hint: What to do if it is really not there.
    """
    return hint if isinstance(location, Path) else location.absence() or hint


def on_disk(file: Location) -> Path:
    """The path of a file on disk; a far one is fetched whole, into its storage's cache.

    Raises:
        MoptError: With a ``hub.*`` code.
    """
    return file if isinstance(file, Path) else file.fetch()


def identify(folder: Location, small: Mapping[str, bytes], files: Iterable[str]) -> dict[str, str]:
    """What is observed of a checkpoint's origin: ``origin``, and ``repo`` and ``commit`` where they are known.

    Args:
        folder: Of the checkpoint.
        small: The bytes of its small files, by name.
        files: Names of its other files.
    """
    return provenance.trace(folder, small, files) if isinstance(folder, Path) else folder.identity()


def local_path(location: Location | None) -> Path | None:
    """The path of a location on disk; None for a far one."""
    return location if isinstance(location, Path) else None
