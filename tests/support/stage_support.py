"""What the tests of the stage share: publishing the tiny checkpoint, and recording what fsops is asked. No torch."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from crash_driver import COPIES, fill, lay, refuse_with

from modelopt_convert.checkpoint.header import TensorSpec, parse_header
from modelopt_convert.checkpoint.record import RECORD, digest_of, write_record
from modelopt_convert.stage import fsops
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.leftovers import Marker, identity_of
from modelopt_convert.stage.ownership import look

NUMBER = "0badcafe"  # of another run
LEFT = f".out.mopt-stage-{NUMBER}"  # its stage
SET_ASIDE = f".out.mopt-old-{NUMBER}"  # an old tree that it set aside
MARK = f".out.mopt-mark-{NUMBER}"  # the marker of both
RECORDED = (
    "make_dir create_file preallocate write_all sync sync_dir close set_mode rename rename_noreplace exchange "
    "remove_tree remove_dir remove_file"
)

Calls = list[tuple[str, ...]]


def publish(out: Path, *, overwrite: bool = True, need_bytes: int = 1, folders: Sequence[str] = ()) -> Published:
    """Publish version ``new``."""
    copies = COPIES if folders else ()
    with StagingDir(out, (), overwrite=overwrite, need_bytes=need_bytes, copies=copies) as stage:
        fill(stage, "new", folders)
        return stage.publish()


def copy_of_left(place: Path, target: Path) -> Path:
    """Copy a folder with what a killed run left in it: a marker speaks of the very folders, so it gets the copies'."""
    shutil.copytree(place, target)
    for mark in target.glob(".*.mopt-mark-*"):
        text = mark.read_text()
        for folder in filter(Path.is_dir, place.iterdir()):
            mine, theirs = (json.dumps(identity_of(one)) for one in (target / folder.name, folder))
            text = text.replace(theirs, mine)
        mark.write_text(text)
    return target


def lay_left(folder: Path, version: str, out: Path | None = None) -> Path:
    """A folder that a killed run left, with the marker of that run.

    Args:
        folder: Its path, with the run's part of the name at the end.
        version: What it holds.
        out: The OUT that the run was to replace, if what it left is that tree.
    """
    lay(folder, version)
    head, _, number = folder.name.rpartition(".mopt-")
    number = number.partition("-")[2]
    marker = Marker(None, look(folder) if out is None else look(out), number=number, stage=identity_of(folder))
    folder.with_name(f"{head}.mopt-mark-{number}").write_bytes(marker.to_bytes())
    return folder


def with_record(folder: Path) -> Path:
    """Give a folder the record that mopt would have written of it: small files, weights, transformers below."""
    parts = {one.name: digest_of((with_record(one) / RECORD).read_bytes()) for one in folder.iterdir() if one.is_dir()}
    names = sorted(one.name for one in folder.iterdir() if one.is_file() and one.name != RECORD)
    small = {name: (folder / name).read_bytes() for name in names if not name.endswith(".safetensors")}
    specs, metadata, tensors = [], {}, {}
    for name in names:
        if name not in small:
            data = (folder / name).read_bytes()
            header = parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")], file=name, file_bytes=len(data))
            specs += list(header.tensors.values())
            metadata[name] = header.metadata
            for info in header.tensors.values():
                tensors[info.name] = xxhash.xxh3_128_hexdigest(data[info.start : info.start + info.num_bytes])
    more = {"parts": parts} if parts else {}
    headers = [TensorSpec(one.name, one.dtype, one.shape) for one in specs]
    record = write_record("test", more, tensors=tensors, files=small, headers=(headers, metadata) if headers else None)
    (folder / RECORD).write_bytes(record)
    return folder


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


def left_trees(out: Path) -> list[str]:
    """What stands beside OUT, but for markers: a marker stays as long as what it is the marker of."""
    found = litter(out)
    marks = [name for name in found if name.startswith(".out.mopt-mark-")]
    numbers = {name.rpartition("-")[2] for name in found if name not in marks}
    assert not [name for name in marks if numbers and name.rpartition("-")[2] not in numbers]
    return [name for name in found if name not in marks]


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

    for name in RECORDED.split():
        spy(name)
    return recorded
