"""What somebody else put beside OUT, or in its place, under the names that mopt uses. No torch."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import files_of, fill, held_by, lay
from stage_support import LEFT, SET_ASIDE, litter, prepare, publish

from modelopt_convert.run.errors import ExitCode, StorageError
from modelopt_convert.stage.directory import StagingDir

OLD, NEW, ANOTHER = files_of("old"), files_of("new"), files_of("another")


def a_link_to_a_checkpoint(path: Path) -> None:
    path.symlink_to(lay(path.parent.parent / "victim", "another"))


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def a_file(path: Path) -> None:
    path.write_bytes(b"mine")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


PLANTS = [a_link_to_a_checkpoint, a_link_to_nowhere, a_file, a_fifo]


@pytest.mark.parametrize("present", [True, False], ids=["OUT stands", "OUT is absent"])
@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_no_folder_is_neither_restored_nor_swept(
    out: Path, place: Path, plant: Callable[[Path], None], name: str, present: bool
) -> None:
    """mopt leaves folders only. A link renamed to OUT would let the next run write into somebody's folder."""
    if present:
        lay(out, "old")
    plant(place / name)
    before = (place / name).lstat()
    assert publish(out).method == ("exchange" if present else "rename")
    assert not out.is_symlink() and held_by(out) == NEW
    assert litter(out) == [name]
    after = (place / name).lstat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    if plant is a_link_to_a_checkpoint:
        assert held_by(place.parent / "victim") == ANOTHER


@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
def test_a_sweep_does_not_follow_links(out: Path, place: Path, name: str) -> None:
    """Not even out of a folder that is swept by right."""
    lay(out, "old")
    victim = lay(place.parent / "victim", "another")
    (place / name).mkdir()
    (place / name / "transformer").symlink_to(victim)
    published = publish(out)
    assert held_by(out) == NEW and held_by(victim) == ANOTHER
    [kept] = litter(out)  # a link is a stranger: the folder is kept and named
    assert [kept in warning for warning in published.warnings] == [True]


def by_renaming(out: Path) -> None:
    out.rename(out.parent / "moved away")
    lay(out, "another")


def by_removing(out: Path) -> None:
    """The kernel gives a freed inode to the next folder, so that numbers alone would not tell."""
    shutil.rmtree(out)
    lay(out, "another")


@pytest.mark.parametrize("method", ["exchange", "two-renames"])
@pytest.mark.parametrize("change", [by_renaming, by_removing])
def test_another_checkpoint_in_place_of_the_one_that_may_be_replaced(
    out: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], method: str
) -> None:
    """--overwrite was consent to replace what stood there then."""
    prepare(method, out, monkeypatch)
    refused_as_changed(out, change)


def test_a_checkpoint_where_there_was_none(out: Path) -> None:
    refused_as_changed(out, lambda path: lay(path, "another"))


def refused_as_changed(out: Path, change: Callable[[Path], object]) -> None:
    with pytest.raises(StorageError) as failed, StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        change(out)
        stage.publish()
    error = failed.value
    assert (error.code, error.exit_code, error.published) == ("storage.swap_refused", ExitCode.STORAGE, False)
    assert held_by(out) == ANOTHER
    assert error.kept_at is not None and held_by(Path(error.kept_at)) == NEW
    assert error.hint is not None and f"mv {error.kept_at} " in error.hint
    assert not [name for name in litter(out) if name.startswith(".")]


def test_an_output_that_was_removed_meanwhile_is_made_new(out: Path) -> None:
    lay(out, "old")
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        shutil.rmtree(out)
        assert stage.publish().method == "rename"
    assert (held_by(out), litter(out)) == (NEW, [])
