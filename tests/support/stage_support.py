"""What the tests of the stage share: publishing the tiny checkpoint, and recording what fsops is asked. No torch."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash_driver import fill, lay, refuse_with

from modelopt_convert.stage import fsops
from modelopt_convert.stage.directory import Published, StagingDir

LEFT = ".out.mopt-stage-0badcafe"  # a stage of another run
SET_ASIDE = ".out.mopt-old-0badcafe"  # an old tree that another run set aside
RECORDED = "make_dir create_file preallocate write_all sync sync_dir close set_mode rename rename_noreplace exchange"

Calls = list[tuple[str, ...]]


def publish(out: Path, *, overwrite: bool = True, need_bytes: int = 1, folders: Sequence[str] = ()) -> Published:
    """Publish version ``new``."""
    with StagingDir(out, (), overwrite=overwrite, need_bytes=need_bytes) as stage:
        fill(stage, "new", folders)
        return stage.publish()


def prepare(method: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run publish by ``method``."""
    if method != "rename":
        lay(out, "old")
    if method == "two-renames":
        forbid_renameat2(monkeypatch)


def forbid_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS."""
    for name in ("exchange", "rename_noreplace"):
        monkeypatch.setattr(fsops, name, refuse_with(22))  # EINVAL


def litter(out: Path) -> list[str]:
    """What stands beside OUT."""
    return sorted(name for name in os.listdir(out.parent) if name != out.name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock as a live run would."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def before(monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[..., object]) -> None:
    """Let ``do`` see the arguments of every call of an fsops function first; it may raise."""
    original = getattr(fsops, name)

    def call(*values: object) -> object:
        do(*values)
        return original(*values)

    monkeypatch.setattr(fsops, name, call)


def record(monkeypatch: pytest.MonkeyPatch, place: Path) -> Calls:
    """Record every outermost call of fsops; paths are relative to ``place`` and lose the run's random part."""
    recorded: Calls = []
    inside: list[str] = []

    def told(value: object) -> str:
        path = Path(f"/proc/self/fd/{value}").readlink() if isinstance(value, int) else value
        text = str(path).replace(f"{place}/", "").replace(str(place), ".")
        return re.sub(r"\.?out\.mopt-(\w+)-(?!0badcafe)[0-9a-f]{8}", r"\1", text)

    def spy(name: str) -> None:
        original = getattr(fsops, name)

        def call(*values: object) -> object:
            if not inside:
                paths = [values[0], *(value for value in values[1:] if isinstance(value, Path))]
                recorded.append((name, *map(told, paths)))
            inside.append(name)
            try:
                return original(*values)
            finally:
                inside.pop()

        monkeypatch.setattr(fsops, name, call)

    for name in (*RECORDED.split(), "remove_tree"):
        spy(name)
    return recorded
