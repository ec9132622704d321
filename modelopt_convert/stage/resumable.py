"""Finished parts of long work, in a folder beside OUT, from which a run that was stopped goes on. No torch.

A part comes to its name whole, by a rename, and carries its own digest: so several processes may put parts into one
folder, and what a power cut tore counts as not done. Nothing is synchronised: a part that is lost is made again.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path

import xxhash

from modelopt_convert.run.boundary import storage_errors
from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage import fsops

_OURS = re.compile(r"part-\d{5,}|\.part-\d{5,}-[0-9a-f]{8}")
_DIGEST_BYTES = 16


class Parts:
    """The folder, and in it one file for each part that is finished.

    Attributes:
        path: ``OUT.parts``.
    """

    def __init__(self, output: Path) -> None:
        """Nothing is touched yet.

        Args:
            output: OUT.
        """
        self.path = output.parent / f"{output.name}.parts"

    def open(self) -> None:
        """Make the folder, or go on in it.

        Raises:
            OutputRefusedError: ``parts.foreign``: it is no folder, or holds what is no part.
            StorageError: The disk failed.
        """
        with storage_errors(self.path):
            with contextlib.suppress(FileExistsError):
                fsops.make_dir(self.path, 0o777)
            is_folder = self.path.is_dir() and not self.path.is_symlink()
            other = [name for name in os.listdir(self.path) if not _OURS.fullmatch(name)] if is_folder else []
        if other or not is_folder:
            found = f"found {min(other)!r}" if other else "found no folder"
            raise OutputRefusedError(
                f"{self.path}: expected a folder for the parts of this work and nothing else in it, {found}",
                code="parts.foreign",
                path=str(self.path),
                hint="move it away, or give another --output",
            )

    def numbers(self) -> set[int]:
        """Of the parts that are there, whole or not."""
        return {int(name.removeprefix("part-")) for name in os.listdir(self.path) if name.startswith("part-")}

    def read(self, number: int) -> bytes | None:
        """A part; None where it is not finished, or not whole."""
        try:
            raw = self._file(number).read_bytes()
        except FileNotFoundError:
            return None
        data = raw[_DIGEST_BYTES:]
        return data if xxhash.xxh3_128_digest(data) == raw[:_DIGEST_BYTES] else None

    def put(self, number: int, data: bytes) -> None:
        """Keep a part.

        Raises:
            StorageError: The disk failed.
        """
        beside = self.path / f".part-{number:05}-{secrets.token_hex(4)}"
        with storage_errors(self.path):
            fd = fsops.create_file(beside)
            try:
                fsops.write_all(fd, xxhash.xxh3_128_digest(data) + data, 0)
            finally:
                fsops.close(fd)
            fsops.rename(beside, self._file(number))

    def remove(self) -> None:
        """Remove the parts and, if it holds nothing else by now, the folder.

        Raises:
            OSError: Something cannot be removed.
        """
        for name in filter(_OURS.fullmatch, os.listdir(self.path)):
            fsops.remove_file(self.path / name)
        fsops.remove_dir(self.path)

    def _file(self, number: int) -> Path:
        return self.path / f"part-{number:05}"
