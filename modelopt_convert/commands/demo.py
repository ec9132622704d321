"""What ``mopt demo`` builds from: a tiny FLUX.1 and its NVFP4 export, which come with mopt. No torch."""

import zipfile
from pathlib import Path

from modelopt_convert.commands.command import ending, versions
from modelopt_convert.commands.requests import BuildNvfp4Request
from modelopt_convert.report.report import OutputReport, Report
from modelopt_convert.run.boundary import storage_errors
from modelopt_convert.run.errors import MoptError, OutputRefusedError

_ARCHIVE = Path(__file__).with_name("demo.zip")  # scripts/make/make_demo.py makes it


def demo_request(folder: Path) -> BuildNvfp4Request:
    """Make a new folder with base and export in it, and the request that builds from them.

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
        with zipfile.ZipFile(_ARCHIVE) as archive:
            archive.extractall(folder)
    return BuildNvfp4Request(
        preset="flux1-dev", export=folder / "export", base=folder / "base", output=folder / "out", verify="cpu"
    )


def refusal(error: MoptError) -> Report:
    """The report of a demo that could not begin; one that began has the report of its build."""
    return Report(command="demo", output=OutputReport(path=""), versions=versions(), **ending(error))
