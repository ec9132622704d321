"""Locks on stages, and where a lock proves anything. No torch."""

import fcntl
import os
from pathlib import Path

from modelopt_convert.stage.mounts import mount_table

# Where flock is known to exclude. On Lustre, GPFS and some NFS it succeeds for every caller.
LOCKING_FILE_SYSTEMS = frozenset({"ext4", "ext3", "ext2", "xfs", "btrfs", "tmpfs", "overlay", "f2fs", "zfs"})


def try_lock(path: Path) -> int | None:
    """Lock a directory (flock), if the path still names it then; None if somebody else holds it or removed it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError):  # it is gone, or belongs to another user
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named, held = path.stat(), os.fstat(fd)
        if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def file_system_of(path: Path) -> str:
    """Type of the file system that holds ``path``, from the longest matching mount point."""
    target = path.resolve()
    best, kind = -1, "unknown"
    for mount in mount_table():
        if target.is_relative_to(mount.point) and len(mount.point.parts) >= best:
            best, kind = len(mount.point.parts), mount.kind
    return kind
