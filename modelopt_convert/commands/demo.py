"""What ``mopt demo`` builds from: a tiny FLUX.1 and its NVFP4 export, which come with mopt. No torch."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelopt_convert.commands.command import ending, versions
from modelopt_convert.commands.requests import BuildNvfp4Request
from modelopt_convert.report.report import OutputReport, Report
from modelopt_convert.run.boundary import storage_errors
from modelopt_convert.run.errors import OutputRefusedError

_ARCHIVE = Path(__file__).with_name("demo.zip")  # scripts/make/make_demo.py makes it


@contextmanager
def demo_files(folder: Path) -> Iterator[BuildNvfp4Request]:
    """A new folder with base and export in it, and the request that builds from them.

    Where no OUT stands there in the end, what was made is removed, so that the same command can be run again.

    Args:
        folder: Must not exist.

    Raises:
        OutputRefusedError: ``output.exists``, or ``output.no_parent``.
        StorageError: It cannot be written.
    """
    with storage_errors(folder):
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise OutputRefusedError(
                f"{folder} exists, expected the name of a new folder",
                code="output.exists",
                path=str(folder),
                hint="name another: mopt demo FOLDER",
            ) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise OutputRefusedError(
                f"{folder}: {folder.parent} is no folder",
                code="output.no_parent",
                path=str(folder),
                hint="make that folder first, or name another: mopt demo FOLDER",
            ) from error
    out = folder / "out"
    try:
        with storage_errors(folder), zipfile.ZipFile(_ARCHIVE) as archive:
            archive.extractall(folder)
        yield BuildNvfp4Request(
            preset="flux1-dev", export=folder / "export", base=folder / "base", output=out, verify="cpu"
        )
    finally:
        if not os.path.lexists(out):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the files that come with mopt, and the folders that are empty then; what else lies there stays."""
    with zipfile.ZipFile(_ARCHIVE) as archive:
        files = [folder / name for name in archive.namelist() if not name.endswith("/")]
    for file in files:
        with suppress(OSError):
            file.unlink()
    folders = {one for file in files for one in file.parents if one.is_relative_to(folder)}
    for one in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            one.rmdir()


def refusal(error: BaseException) -> Report:
    """The report of a demo that could not begin; one that began has the report of its build."""
    return Report(command="demo", output=OutputReport(path=""), versions=versions(), **ending(error))
