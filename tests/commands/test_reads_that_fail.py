"""Nothing is known of bytes that a disk does not give: never a failed check, always the code of whose file it is."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import WORDS, words_of
from root import LONG
from support import Outcome, run_mopt

COMMANDS = ["build-nvfp4", "convert", "convert-fp8", "swap-nibbles", "verify", "inspect"]
POINTS = 20 if LONG else 1


class Disk:
    """Counts opens and reads of files below a folder; one of them fails."""

    def __init__(self, folder: Path, fails: int = 0) -> None:
        """Of ``folder``; call ``fails`` fails, counted from 1."""
        self.folder, self.calls, self.fails = folder, 0, fails

    def ask(self, path: str) -> None:
        """A call on a file."""
        if Path(path).is_relative_to(self.folder) and path.endswith((".safetensors", ".json")):
            self.calls += 1
            if self.calls == self.fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def watched(disk: Disk) -> Iterator[None]:
    """What reads in this process asks the disk first."""
    opened = os.open

    def opening(path: Any, flags: int, *more: Any, **how: Any) -> int:
        if isinstance(path, str | Path) and not flags & (os.O_WRONLY | os.O_RDWR):
            try:
                disk.ask(str(path))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None  # an open that fails has the name
        return opened(path, flags, *more, **how)

    def reading(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(descriptor: int, *more: Any) -> Any:
            disk.ask(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            return real(descriptor, *more)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opening)
        patch.setattr(os, "pread", reading(os.pread))
        patch.setattr(os, "preadv", reading(os.preadv))
        yield


def run(words: list[str], disk: Disk) -> Outcome:
    """A run on that disk."""
    with watched(disk):
        return run_mopt(*words)


FOLDERS = ("nvfp4", "fp8", "base", "built", "out")
CASES = [(command, one) for command in COMMANDS for one in FOLDERS if f"{{{one}}}" in WORDS[command]]


@pytest.mark.parametrize(("command", "folder"), CASES)
def test_a_read_that_fails_is_no_failed_check(
    exports: Path, built: Path, tmp_path: Path, command: str, folder: str
) -> None:
    places = {name: exports / name for name in ("nvfp4", "fp8", "base")} | {"built": built, "out": tmp_path / "out"}
    words, where = words_of(command, places), tmp_path if folder == "out" else places[folder]
    whole = Disk(where)
    assert run(words, whole).exit_code == 0 and whole.calls
    shutil.rmtree(places["out"], ignore_errors=True)
    chance = random.Random(f"{command} {folder}")
    for fails in [1, whole.calls, *(chance.randint(1, whole.calls) for _ in range(POINTS))]:
        ended = run(words, Disk(where, fails))
        told = (fails, whole.calls, ended.stderr)
        wanted = ("storage.failed", 5) if folder == "out" else ("input.unreadable", 3)
        assert (ended.error_code, ended.exit_code) == wanted, told
        assert str(where) in ended.message and os.strerror(errno.EIO) in ended.message, told
        assert list(tmp_path.iterdir()) == [], told
