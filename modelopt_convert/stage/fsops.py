"""The few file-system calls that change anything: one place for tests to record, fail or cut short.

Everything that mopt creates, renames, synchronises or removes goes through here.
"""

import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
_FAILED = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})


def make_dir(path: Path, mode: int) -> None:
    """Create one directory."""
    path.mkdir(mode=mode)


def create_file(path: Path, mode: int | None = None) -> int:
    """Create a file that must not exist and return its descriptor; with this mode, or 0o666 less the umask."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(fd).st_mode) != mode:  # the umask took something away
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def preallocate(fd: int, num_bytes: int) -> None:
    """Reserve the file's whole size now, so that a full disk is found before the work."""
    if num_bytes:
        os.posix_fallocate(fd, 0, num_bytes)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` until every byte is down; a short write is continued.

    Raises:
        OSError: What ``pwrite`` raises; ``EIO`` if the kernel takes no bytes and reports no error.
    """
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepted no bytes")
        view = view[written:]
        offset += written


def copy_blocks(source: int, source_offset: int, target: int, offset: int, num_bytes: int) -> range:
    """Copy the whole blocks of a range within the kernel; XFS and Btrfs share them and move no byte.

    Returns:
        What was copied, counted from the beginning of the range. Nothing where blocks begin elsewhere in the source
        than in the target, or where the kernel cannot.

    Raises:
        OSError: ``EIO``, ``ENOSPC`` or ``EDQUOT``.
    """
    block = os.fstatvfs(target).f_frsize
    first = done = -offset % block
    end = (offset + num_bytes) // block * block - offset
    if (source_offset - offset) % block:
        return range(0)
    try:
        while done < end and (
            count := os.copy_file_range(source, target, end - done, source_offset + done, offset + done)
        ):
            done += count
    except OSError as error:
        if error.errno in _FAILED:
            raise
    return range(first, done)


def start_writeback(fd: int, offset: int, num_bytes: int) -> None:
    """Have the disk begin with a range that was written, so that little is left for ``sync``; promises nothing.

    The call does not wait, so it takes no write error away from the ``sync`` that is to report the error.
    """
    function = getattr(_libc(), "sync_file_range", None)  # Linux
    if function is not None:
        function(fd, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)


def sync(fd: int) -> bool:
    """``fsync``, never tried again after an error. False where the file system has none, as in restic."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in _NO_FSYNC:
            return False
        raise
    return True


def sync_dir(path: Path) -> bool:
    """``fsync`` a directory, so that the names in it are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return sync(fd)
    finally:
        os.close(fd)


def close(fd: int) -> None:
    """Close a written file; its error counts."""
    os.close(fd)


def set_mode(path: Path, mode: int) -> None:
    """``chmod``."""
    path.chmod(mode)


def rename(source: Path, target: Path) -> None:
    """Plain rename."""
    source.rename(target)


def rename_noreplace(source: Path, target: Path) -> None:
    """Rename only if ``target`` does not exist, atomically.

    Raises:
        OSError: ``EEXIST`` if it does; ``EINVAL`` or ``ENOSYS`` where the file system cannot.
    """
    _renameat2(source, target, _RENAME_NOREPLACE)


def exchange(left: Path, right: Path) -> None:
    """Swap two existing names atomically.

    Raises:
        OSError: ``EINVAL`` or ``ENOSYS`` where the file system cannot.
    """
    _renameat2(left, right, _RENAME_EXCHANGE)


def remove_tree(path: Path) -> None:
    """Remove a directory tree, and follow no links; only trees that mopt made or replaced are removed.

    One free descriptor is enough: a run that ended since it had none left must not leave its stage for that.
    """
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno not in _NO_DESCRIPTOR:
            if error.filename is not None:  # shutil has the bare name
                error.filename = os.path.join(path, os.fspath(error.filename))  # noqa: PTH118 - may be absolute already
            raise
        _remove_by_path(path)


def remove_dir(path: Path) -> None:
    """Remove an empty directory."""
    path.rmdir()


def remove_file(path: Path) -> None:
    """Remove one file."""
    path.unlink()


def _remove_by_path(folder: Path) -> None:
    for name in os.listdir(folder):
        path = folder / name
        if stat.S_ISDIR(path.lstat().st_mode):
            _remove_by_path(path)
        else:
            path.unlink()
    folder.rmdir()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    function = getattr(_libc(), "renameat2", None)  # glibc 2.28 and newer
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(target))
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(target))
