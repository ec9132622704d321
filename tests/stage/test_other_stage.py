"""The stage's name is nobody's to give: the folder that mopt made is published, with the files that it wrote."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import COPIES, FOLDERS, fill, held_by, lay
from stage_support import forbid_renameat2, publish

from modelopt_convert.run.errors import CheckFailedError, StorageError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.directory import StagingDir

METHODS = ("rename", "exchange", "two-renames")


def link_to_somewhere(stage: Path) -> None:
    other = stage.parent / "other"
    other.mkdir()
    (other / "thesis.md").write_text("mine")
    stage.rename(stage.parent / "moved")
    stage.symlink_to(other)


def another_folder(stage: Path) -> None:
    stage.rename(stage.parent / "moved")
    stage.mkdir()
    (stage / "thesis.md").write_text("mine")


def nothing(stage: Path) -> None:
    stage.rename(stage.parent / "moved")


def replaced(stage: Path) -> None:
    (stage / "mine").write_text("mine")
    (stage / "mine").rename(stage / "transformer" / "config.json")


def edited(stage: Path) -> None:
    with (stage / "vae" / "model.safetensors").open("r+b") as file:
        file.write(b"mine")


TAKEN: dict[str, Callable[[Path], object]] = {"a link": link_to_somewhere, "a folder": another_folder, "gone": nothing}
CHANGED: dict[str, Callable[[Path], object]] = {
    "a note": lambda stage: (stage / "note.md").write_text("mine"),
    "a shard": lambda stage: (stage / "transformer" / "mine.safetensors").write_text("mine"),
    "a link": lambda stage: (stage / "transformer" / "note.md").symlink_to("config.json"),
    "a folder": lambda stage: (stage / "notes").mkdir(),
    "another file of that name": replaced,
    "an edit": edited,
    "a file is gone": lambda stage: (stage / "transformer_2" / "mopt.json").unlink(),
}


def staged(out: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What stands at OUT, before a run that publishes by ``method``."""
    if method != "rename":
        lay(out, "old", FOLDERS)
    if method == "two-renames":
        forbid_renameat2(monkeypatch)
    return held_by(out)


def refused(out: Path, change: Callable[[Path], object]) -> StorageError:
    """Fill a stage, let ``change`` have its way with the stage, publish."""
    with (
        pytest.raises(StorageError) as caught,
        StagingDir(out, (), overwrite=True, need_bytes=1, copies=COPIES) as stage,
    ):
        fill(stage, "new", FOLDERS)
        change(stage.path)
        stage.publish()
    assert caught.value.code == "storage.swap_refused" and not caught.value.published
    return caught.value


@pytest.mark.parametrize("how", TAKEN)
@pytest.mark.parametrize("method", METHODS)
def test_what_took_the_name_of_the_stage_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    before = staged(tmp_path / "out", method, monkeypatch)
    refused(tmp_path / "out", TAKEN[how])
    assert held_by(tmp_path / "out") == before and held_by(tmp_path / "moved")
    notes = list(tmp_path.rglob("thesis.md"))
    assert how == "gone" or [note.read_text() for note in notes] == ["mine"]
    # What is not mopt's keeps the name that it was given, whatever it holds and whoever comes next.
    [*left] = tmp_path.glob(".out.mopt-stage-*")
    assert len(left) == (how != "gone") and not list(tmp_path.glob("*.mopt-kept-*"))
    if how == "a folder":
        (left[0] / "config.json").write_text("mine")
        mine = held_by(left[0])
        publish(tmp_path / "out", folders=FOLDERS)
        assert held_by(left[0]) == mine


@pytest.mark.parametrize("how", ["a link", "a folder"])
@pytest.mark.parametrize("method", METHODS)
def test_nor_in_the_instant_of_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    before = staged(tmp_path / "out", method, monkeypatch)
    # Without an exchange, the second of two renames gives the stage's name away.
    name = {"rename": "rename_noreplace", "exchange": "exchange", "two-renames": "rename"}[method]
    real = getattr(fsops, name)

    def late(source: Path, target: Path) -> None:
        if target == tmp_path / "out" or name == "exchange":
            monkeypatch.setattr(fsops, name, real)
            TAKEN[how](source)
        real(source, target)

    monkeypatch.setattr(fsops, name, late)
    refused(tmp_path / "out", lambda _: None)
    assert held_by(tmp_path / "out") == before and held_by(tmp_path / "moved")
    assert [note.read_text() for note in tmp_path.rglob("thesis.md")] == ["mine"]


def test_what_cannot_be_put_back_is_named_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = staged(tmp_path / "out", "exchange", monkeypatch)
    real = fsops.exchange

    def once(source: Path, target: Path) -> None:
        link_to_somewhere(source)
        real(source, target)

        def refuse(_source: Path, _target: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(fsops, "exchange", refuse)

    monkeypatch.setattr(fsops, "exchange", once)
    error = refused(tmp_path / "out", lambda _: None)
    [old] = tmp_path.glob(".out.mopt-stage-*")
    assert str(old) in error.message and held_by(old) == before
    assert (tmp_path / "other" / "thesis.md").read_text() == "mine"
    monkeypatch.setattr(fsops, "exchange", real)
    (tmp_path / "out").unlink()
    publish(tmp_path / "out", folders=FOLDERS)
    assert held_by(old) == before


@pytest.mark.parametrize("how", CHANGED)
@pytest.mark.parametrize("method", METHODS)
def test_what_somebody_put_into_the_stage_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    before = staged(tmp_path / "out", method, monkeypatch)
    error = refused(tmp_path / "out", CHANGED[how])
    assert held_by(tmp_path / "out") == before
    assert error.kept_at is not None and held_by(Path(error.kept_at))
    assert list(tmp_path.glob(".out.mopt-*")) == []


def failed(out: Path, change: Callable[[Path], object]) -> CheckFailedError:
    """Fill a stage, let ``change`` have its way, and find something wrong with what was written."""
    with (
        pytest.raises(CheckFailedError) as caught,
        StagingDir(out, (), overwrite=True, need_bytes=1, copies=COPIES) as stage,
    ):
        fill(stage, "new", FOLDERS)
        change(stage.path)
        raise CheckFailedError("wrong", code="check.verify", hint="look")
    return caught.value


@pytest.mark.parametrize("how", TAKEN)
def test_a_run_that_fails_removes_its_own_stage_alone(tmp_path: Path, how: str) -> None:
    before = held_by(lay(tmp_path / "out", "old", FOLDERS))

    def change(stage: Path) -> None:
        TAKEN[how](stage)
        if how == "a folder":
            (stage / "config.json").write_text("mine")

    error = failed(tmp_path / "out", change)
    assert held_by(tmp_path / "out") == before and held_by(tmp_path / "moved")
    assert ("is left alone" in str(error.hint)) is (how != "gone")
    for _ in range(2):  # nor does the next one
        assert how == "gone" or [note.read_text() for note in tmp_path.rglob("thesis.md")] == ["mine"]
        found = [path.read_text() for path in tmp_path.glob(".out.mopt-stage-*/config.json") if not path.is_symlink()]
        assert how != "a folder" or found == ["mine"]
        publish(tmp_path / "out", folders=FOLDERS)


def test_what_somebody_put_into_the_stage_of_a_run_that_fails_is_kept_and_named(tmp_path: Path) -> None:
    error = failed(tmp_path / "out", lambda stage: (stage / "note.md").write_text("mine"))
    [kept] = tmp_path.iterdir()
    assert (kept / "note.md").read_text() == "mine" and str(error.hint).startswith("look; ") and str(kept) in error.hint
