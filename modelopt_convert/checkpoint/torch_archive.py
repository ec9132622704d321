"""The zip that ``torch.save`` writes: checked, and what is needed of it copied to where nobody can change it. No torch.

torch maps such a file into memory. A mapped file that is truncated kills the reader, or reads as zeros. So torch never
sees the file itself. torch gets a sparse copy in memory: the pickle, the beginning of every tensor, and holes for the
rest.
"""

import contextlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.run.errors import InputError

COPIED_BYTES = 4096  # from the beginning of every tensor
_MAX_PICKLE_BYTES = 64 << 20  # a pickle of 600 kB describes 1,200 tensors
_MAX_DIRECTORY_BYTES = 16 << 20
_HEADER_BYTES = 30  # the fixed part of a member's local header


@contextmanager
def private_copy(path: Path) -> Iterator[tuple[str, int]]:
    """A copy that is right where the pickle lies and in the first ``COPIED_BYTES`` of every tensor.

    Args:
        path: The file; a link is followed, since the user named it.

    Yields:
        The copy's path, which is gone afterwards, and its size.

    Raises:
        InputError: With a ``pickle.*`` or ``input.*`` code: the file is no plain torch archive, or changed meanwhile.
    """
    real = Path(os.path.realpath(path))
    with contextlib.closing(LocalFile(real.parent, real.name, where=str(path))) as file:
        fd = os.memfd_create("mopt", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, file.num_bytes)
            for begin, end in _checked(path, file):
                os.pwrite(fd, file.read(begin, end - begin), begin)
            file.check_unchanged()
            yield f"/proc/self/fd/{fd}", file.num_bytes
        finally:
            os.close(fd)


def refusal(path: object, kind: str, found: str, hint: str) -> InputError:
    """The error for a ``.pt`` that is not used."""
    return InputError(f"{path}: {found}", code=f"pickle.{kind}", path=str(path), hint=hint)


class _Reading(io.RawIOBase):
    """A checked file for zipfile, which reads at once as many bytes as the archive claims for its directory."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.num_bytes}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._file.num_bytes - self._at)
        count = rest if size < 0 else min(size, rest)
        if count > _MAX_DIRECTORY_BYTES:
            raise OSError(f"a directory of {count} bytes, expected at most {_MAX_DIRECTORY_BYTES}")
        found = self._file.read(self._at, count)
        self._at += count
        return found


def _checked(path: Path, file: LocalFile) -> Iterator[tuple[int, int]]:
    """Refuse what is not a plain torch archive, whose members are stored one after the other, as large as they say.

    Yields:
        The parts of the file that are to be copied.
    """
    try:
        archive = zipfile.ZipFile(_Reading(file))
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise refusal(path, "not_zip", f"not a zip archive: {error}", "old and tar formats are not read") from error
    with archive:
        members, size = archive.infolist(), archive.start_dir  # members end where the directory begins
    names = Counter(member.filename for member in members)
    if min((member.header_offset for member in members), default=-1) != 0:
        raise refusal(path, "member", "something lies before the first member", "do not use it")
    yield size, file.num_bytes
    end = 0
    for member in sorted(members, key=lambda one: one.header_offset):
        name = repr(member.filename[:200])
        plain = not member.filename.startswith("/") and ".." not in PurePosixPath(member.filename).parts
        if not plain or "\\" in member.filename or names[member.filename] > 1:
            raise refusal(path, "member", f"member {name} has no plain name of its own", "do not use it")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise refusal(path, "compressed", f"member {name} is compressed", "torch.save stores plainly")
        if member.header_offset < end:
            raise refusal(path, "member", f"member {name} overlaps another", "do not use it")
        end = member.header_offset + _HEADER_BYTES + len(member.orig_filename.encode()) + member.file_size
        if member.file_size != member.compress_size or end > size:
            raise refusal(path, "size", f"member {name} is larger than the file", "the file is cut")
        yield member.header_offset, min(_copied(path, file, member), size)


def _copied(path: Path, file: LocalFile, member: zipfile.ZipInfo) -> int:
    """Where the part of a member that is copied ends."""
    fixed = file.read(member.header_offset, _HEADER_BYTES)
    begin = member.header_offset + _HEADER_BYTES
    begin += int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
    leaf = member.filename.rpartition("/")[2]
    if leaf == "byteorder" and file.read(begin, min(member.file_size, 16)) != b"little":
        # torch would swap the bytes of every tensor in memory.
        raise refusal(path, "content", "was not saved on a little-endian machine", "save it again on one")
    if leaf != "data.pkl":
        return begin + min(member.file_size, COPIED_BYTES)
    if member.file_size > _MAX_PICKLE_BYTES:
        found = f"its pickle has {member.file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
        raise refusal(path, "too_large", found, "no checkpoint of a model needs so many; do not use it")
    return begin + member.file_size
