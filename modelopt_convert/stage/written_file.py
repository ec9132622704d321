"""The one writer of files that are no checkpoint: JSON reports, pages, plots and presets. No torch.

Such a file is written beside its place and renamed, so nothing is ever written through a link or a mount. Only a file
that mopt's own marker identifies from its beginning to its end is replaced, or an empty one: JSON with the schema of a
report, HTML with the generator of a page, SVG with that of a plot, and a preset with the digest of all that follows:
one that somebody has edited is theirs.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from modelopt_convert.run.boundary import storage_error, storage_errors
from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.locks import LOCKING_FILE_SYSTEMS, file_system_of
from modelopt_convert.stage.mounts import is_mount_point
from modelopt_convert.stage.output_rules import canonical_output, refuse_overlap

PAGE_HEAD = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="mopt verify">\n'
)
ADVICE_HEAD, SHEET_HEAD = (PAGE_HEAD.replace("mopt verify", f"mopt {name}") for name in ("advise", "compare"))
PLOT_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" data-generator="mopt advise"'
_PRESET_HEAD = "# Written by `mopt advise`; sha256 of the lines below: "
_PAGES = (PAGE_HEAD.encode(), ADVICE_HEAD.encode(), SHEET_HEAD.encode())
# A record is none of these: it belongs to a checkpoint.
_BEGINNINGS = (
    *(f'{{"schema":"mopt.{name}/'.encode() for name in ("report", "inspect", "fidelity", "advice")),
    *(*_PAGES, PLOT_HEAD.encode(), _PRESET_HEAD.encode()),
)
_SCHEMA = re.compile(r"mopt\.(report|inspect|fidelity|advice)/\d+")
_PAGE_END, _PLOT_END = b"</html>", b"</svg>"
_MAX_BYTES = 1 << 28  # of what is looked at as one of mopt's
_LEFT = re.compile(r"\.mopt-report-[0-9a-f]{8}")
_HEAD_BYTES = 4096


def check_file_place(file: Path, others: Sequence[Path]) -> None:
    """Refuse a place at which no report may stand.

    Args:
        file: The report.
        others: Inputs, presets and OUT: it may not be one or lie in one, under whatever name.

    Raises:
        OutputRefusedError: ``report.place``.
        StorageError: The disk does not say what is there.
    """
    path = canonical_output(file)
    with storage_errors(path):
        try:
            free = path.parent.is_dir() and not path.is_dir()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            free = False
    for other in others:
        with contextlib.suppress(OSError):  # of the input or of OUT: the command itself says that, of all of them
            try:
                free = free and path != canonical_output(other)
                if free and other.exists():
                    refuse_overlap(path, other)
            except OutputRefusedError:
                free = False
    if not free:
        raise OutputRefusedError(
            f"{file} must name a file in an existing folder, outside every input and the output",
            code="report.place",
            path=str(file),
            hint="give another file",
        )


def check_file_replaced(file: Path) -> None:
    """Refuse to replace what mopt did not write.

    Raises:
        OutputRefusedError: ``report.foreign``.
    """
    path = canonical_output(file)
    try:
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        ours = is_file and (status.st_size == 0 or _is_marked(_content(path)))
        what = "is there, and is no report that mopt wrote" if is_file else "is no regular file"
        if ours and is_mount_point(path):
            ours, what = False, "is a mount point"
    except FileNotFoundError:
        return
    except OSError as error:
        ours, what = False, f"is there, and cannot be read: {error.strerror}"
    if not ours:
        hint = "give another file" if what == "is no regular file" else "give another file, or move it away yourself"
        raise OutputRefusedError(f"{file}: {what}", code="report.foreign", path=str(file), hint=hint)


def check_file_writable(file: Path) -> None:
    """Refuse, before the work, a report that could not be written after it.

    Raises:
        OutputRefusedError: ``report.foreign``.
        StorageError: Its folder takes no new file.
    """
    check_file_replaced(file)
    path = canonical_output(file)
    try:
        beside, fd = _create_beside(path, None)
        fsops.close(fd)
        fsops.remove_file(beside)
    except OSError as error:
        raise storage_error(OSError(error.errno, error.strerror, str(file)), file) from error


def is_same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file, or would."""
    left, right = canonical_output(one), canonical_output(other)
    with contextlib.suppress(OSError):
        if left.name == right.name and left.parent.samefile(right.parent):
            return True
        return left.samefile(right)
    return left == right


def write_report(file: Path, text: str) -> None:
    """Put a report, or a page, in its place: the old one or the new one stands there at every moment.

    Raises:
        OutputRefusedError: ``report.foreign``.
        StorageError: The disk failed.
    """
    path = canonical_output(file)
    check_file_replaced(path)
    with storage_errors(path):
        _sweep(path.parent)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        beside, fd = _create_beside(path, mode)
        try:
            fsops.write_all(fd, text.encode(), 0)
            fsops.sync(fd)
            check_file_replaced(path)  # what came meanwhile is no less somebody's
            _put(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fsops.remove_file(beside)
            raise
        finally:
            fsops.close(fd)
        fsops.sync_dir(path.parent)


def sealed(preset: str) -> str:
    """The text of a preset with the line at its head by which it is known until somebody edits it."""
    return f"{_seal(preset.encode()).decode()}\n{preset}"


def _seal(text: bytes) -> bytes:
    return f"{_PRESET_HEAD}{hashlib.sha256(text).hexdigest()}".encode()


def _put(beside: Path, path: Path) -> None:
    if not os.path.lexists(path):
        try:
            fsops.rename_noreplace(beside, path)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
    fsops.rename(beside, path)


def _create_beside(path: Path, mode: int | None) -> tuple[Path, int]:
    """A new file, locked so that no other run sweeps it."""
    while True:
        beside = path.parent / f".mopt-report-{secrets.token_hex(4)}"
        fd = fsops.create_file(beside, mode)
        with contextlib.suppress(OSError):  # where there are no locks nothing is swept either
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # 0: swept before it was locked
            return beside, fd
        fsops.close(fd)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left: of that name, no longer locked, and begun as mopt begins its files."""
    if file_system_of(folder) not in LOCKING_FILE_SYSTEMS:
        return
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder may take files and not be listed
        names = os.listdir(folder)
    for name in filter(_LEFT.fullmatch, names):
        with contextlib.suppress(OSError):  # another user's, or another run removes it too
            fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                head = os.pread(fd, _HEAD_BYTES, 0)
                if any(head[: len(one)] == one[: len(head)] for one in _BEGINNINGS):
                    fsops.remove_file(folder / name)
            finally:
                os.close(fd)


def _is_marked(content: bytes) -> bool:
    """Whether it is a file of mopt, and nothing behind."""
    if content.startswith(_PAGES):
        return content.rstrip().endswith(_PAGE_END)
    if content.startswith(PLOT_HEAD.encode()):
        return content.rstrip().endswith(_PLOT_END)
    if content.startswith(_PRESET_HEAD.encode()):
        head, _, text = content.partition(b"\n")
        return head == _seal(text)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    key, schema = next(iter(found.items()), ("", "")) if isinstance(found, dict) else ("", "")
    return key == "schema" and isinstance(schema, str) and _SCHEMA.fullmatch(schema) is not None


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        return file.read(_MAX_BYTES)
