"""Archives of torch that are hostile, or changed member by member."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def rezipped(source: Path, target: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Path:
    """A copy of a zip, member by member as ``change`` writes them; stored, like the original."""
    with (
        zipfile.ZipFile(source) as read,
        zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as write,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of duplicate names
        for info in read.infolist():
            change(write, info.filename, read.read(info))
    return target


def as_it_is(write: zipfile.ZipFile, name: str, content: bytes) -> None:
    write.writestr(name, content)
