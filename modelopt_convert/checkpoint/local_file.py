"""Files on disk, read with pread. No torch.

The file is not mapped: if a mapped file is truncated, SIGBUS kills the reader. pread returns a short count, and the
count becomes an error message.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from modelopt_convert.run.errors import InputError


class LocalFile:
    """One opened file of a checkpoint.

    Attributes:
        where: Its name in messages.
        num_bytes: Its size when it was opened.
        state: The size and the modification time (ns) when it was opened.
        fetched: Bytes that came over the network: none.
        requests: How many ranges were asked for: none.
    """

    fetched = 0
    requests = 0

    def __init__(
        self, folder: Path, name: str, *, where: str | None = None, state: tuple[int, int] | None = None
    ) -> None:
        """Open a regular file; links may only lead to inside the folder or to the blobs of its Hub cache.

        Args:
            folder: The checkpoint.
            name: The file's name in that folder.
            where: How messages call the file, if not by its path.
            state: The ``state`` that the file had when somebody else opened it, if it must be the same file.

        Raises:
            InputError: ``input.missing``, ``input.unreadable``, ``input.too_many_files``, ``input.symlink_escape``,
                ``input.not_regular`` or ``input.changed``.
        """
        path = folder / name
        self.where = where or str(path)
        try:
            check_link(folder, path)
            # O_NONBLOCK so that a FIFO in place of a file cannot hang the run.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, RuntimeError) as error:  # resolve() calls a loop of links a RuntimeError up to Python 3.12
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise InputError(
                    f"{path}: cannot be opened: {os.strerror(error.errno)}",
                    code="input.too_many_files",
                    path=str(path),
                    hint="the checkpoint has more files than a process may hold open; raise the limit with ulimit -n",
                ) from error
            raise InputError(
                f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}",
                code="input.missing" if isinstance(error, FileNotFoundError) else "input.unreadable",
                path=str(path),
                hint="check that you may read it, then run again"
                if isinstance(error, PermissionError)
                else "the checkpoint is incomplete or not readable; download or export it again",
            ) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise InputError(
                f"{path}: expected a regular file, found {stat.filemode(status.st_mode)}",
                code="input.not_regular",
                path=str(path),
                hint="replace it by the file itself",
            )
        self.num_bytes = status.st_size
        self.state = (status.st_size, status.st_mtime_ns)
        if state not in (None, self.state):
            os.close(self._fd)
            raise self._changed()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes from ``offset``.

        Raises:
            InputError: ``input.changed``: the file has become shorter.
            OSError: The disk failed.
        """
        parts: list[bytes] = []
        missing = num_bytes
        while missing:
            try:
                part = os.pread(self._fd, missing, offset)
            except OSError as error:
                raise self._unreadable(missing, offset, error) from error
            if not part:
                raise self._changed()
            parts.append(part)
            missing -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset``.

        Raises:
            InputError, OSError: As ``read``.
        """
        while target:
            try:
                count = os.preadv(self._fd, [target], offset)
            except OSError as error:
                raise self._unreadable(len(target), offset, error) from error
            if not count:
                raise self._changed()
            target, offset = target[count:], offset + count

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing: the disk is near."""

    def unfetched(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Bytes that reading would bring over the network: none."""
        return 0

    def check_unchanged(self) -> None:
        """Compare size and modification time with those at opening.

        Raises:
            InputError: ``input.changed``.
        """
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != self.state:
            raise self._changed()

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def _unreadable(self, num_bytes: int, offset: int, error: OSError) -> OSError:
        # No InputError: nothing is known of the bytes, and only the command knows whether they are an input's.
        return OSError(error.errno, f"{error.strerror}, reading {num_bytes} bytes at {offset}", self.where)

    def _changed(self) -> InputError:
        return InputError(
            f"{self.where}: the file changed while it was read",
            code="input.changed",
            path=self.where,
            hint="wait until whatever writes it has finished, then run again",
        )


def check_link(folder: Path, path: Path) -> None:
    """Allow a link only into the folder itself, or to blobs of the Hub cache if the folder is a snapshot in that cache.

    The blobs are the repo's own or, for files of Xet repos, those that all repos of the cache share.

    Raises:
        InputError: ``input.symlink_escape``.
    """
    if not path.is_symlink():
        return
    target, root = path.resolve(), folder.resolve()
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    allowed = [root] if cache is None else [root, cache / "blobs"]
    if cache is not None and cache.name.startswith("models--"):
        allowed.append(cache.parent / "blobs")
    if any(target.is_relative_to(place) for place in allowed):
        return
    raise InputError(
        f"{path}: a link to {target}, outside the checkpoint",
        code="input.symlink_escape",
        path=str(path),
        hint="replace the link by the file itself",
    )
