"""What a disk says when it says no, in one clear line. No torch."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from modelopt_convert.run.errors import StorageError


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what the kernel says into one clear line with the path and the errno."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error


def storage_error(error: OSError, where: Path) -> StorageError:
    """The StorageError for an OSError of a write: path, errno by name, and what to do."""
    name = errno.errorcode.get(error.errno or 0, "unknown")
    space = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return StorageError(
        f"{error.filename or where}: {error.strerror} ({name})",
        code="storage.no_space" if space else "storage.failed",
        path=str(error.filename or where),
        hint="free some space, then run again" if space else "check the disk and its permissions, then run again",
    )
