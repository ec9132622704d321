"""The renames that put a finished stage in OUT's place, and those that undo them. No torch."""

import errno
import os
from pathlib import Path
from typing import Literal

from modelopt_convert.stage import fsops

Method = Literal["rename", "exchange", "two-renames"]
NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS})


def swap(stage: Path, output: Path, old: Path, *, replaces: bool) -> tuple[Method, Path | None]:
    """Give the stage OUT's name.

    Args:
        stage: The finished stage.
        output: OUT.
        old: Where the replaced tree goes where two names cannot be exchanged.
        replaces: Whether OUT exists.

    Returns:
        How, and where the replaced tree stands now.

    Raises:
        OSError: The system refused; OUT is what it was, or the message says where that is.
    """
    if not replaces:
        try:
            fsops.rename_noreplace(stage, output)
        except OSError as error:
            if error.errno not in NO_EXCHANGE:
                raise
            if os.path.lexists(output):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(output)) from None
            fsops.rename(stage, output)
        return "rename", None
    try:
        fsops.exchange(stage, output)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        _two_renames(stage, output, old)
        return "two-renames", old
    return "exchange", stage


def undo(method: Method, stage: Path, output: Path, old: Path | None) -> None:
    """Put back what stood at OUT; what took the stage's name meanwhile gets that name again.

    Raises:
        OSError: The system refused; nothing is lost, and the old tree is in ``old``.
    """
    if method == "exchange":
        fsops.exchange(stage, output)
        return
    fsops.rename(output, stage)
    if old is not None:
        fsops.rename(old, output)


def _two_renames(stage: Path, output: Path, old: Path) -> None:
    fsops.rename(output, old)
    try:
        fsops.rename(stage, output)
    except OSError as error:
        try:
            fsops.rename(old, output)
        except OSError:
            left = f"{error.strerror}; the old one could not be put back, the next run will: it is in {old}"
            raise OSError(error.errno, left, error.filename) from error
        raise
