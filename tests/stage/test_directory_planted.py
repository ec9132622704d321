"""What somebody else put beside OUT, or in its place, under the names that mopt uses. No torch."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_driver import files_of, fill, held_by, lay
from stage_support import LEFT, MARK, NUMBER, SET_ASIDE, lay_left, litter, prepare, publish

from modelopt_convert.run.errors import ExitCode, StorageError
from modelopt_convert.stage import directory, leftovers
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.leftovers import Marker, identity_of, read_marker
from modelopt_convert.stage.ownership import look

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


@pytest.mark.parametrize("present", [True, False], ids=["OUT stands", "OUT is absent"])
@pytest.mark.parametrize("name", [SET_ASIDE, LEFT, ".out.mopt-old-x", ".out.mopt-stage-user", ".out.mopt-old-0BADCAFE"])
@pytest.mark.parametrize("marker", [None, b"", b"mine", b'{"schema": "mopt.report/1"}'])
def test_a_folder_without_a_marker_is_neither_restored_nor_swept(
    out: Path, place: Path, name: str, present: bool, marker: bytes | None
) -> None:
    """Whoever made it, and whatever it looks like, it may hold somebody's thesis."""
    if present:
        lay(out, "old")
    lay(place / name, "another")
    (place / name / "thesis.md").write_text("mine")
    mark = place / f".out.mopt-mark-{name.rpartition('-')[2]}"
    if marker is not None:
        mark.mkdir() if marker == b"" else mark.write_bytes(marker)
    left = litter(out)
    published = publish(out, overwrite=present)
    assert published.method == ("exchange" if present else "rename") and held_by(out) == NEW
    assert litter(out) == left and held_by(place / name) == ANOTHER | {"thesis.md": b"mine"}
    # What has a name that mopt gives is named, so that nobody wonders.
    assert [name in warning for warning in published.warnings] == [True] * (name in {SET_ASIDE, LEFT})


@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
def test_an_empty_folder_of_a_run_that_was_killed_at_once_is_swept(out: Path, place: Path, name: str) -> None:
    """It came before its marker, and nobody loses anything by it."""
    lay(out, "old")
    (place / name).mkdir()
    assert publish(out).warnings == ()
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("data", [None, b"", b'{"sche', bytes(100)])
def test_a_marker_alone_is_swept(out: Path, place: Path, data: bytes | None, present: bool) -> None:
    """Also one whose writing was cut short, by a kill or by a power cut that left zeros."""
    if present:
        lay(out, "old")
    (place / MARK).write_bytes(Marker(None, {}, number=NUMBER, stage=(0, 0)).to_bytes() if data is None else data)
    assert publish(out).warnings == ()
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("data", [b"", bytes(100)])
@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
@pytest.mark.parametrize("present", [True, False])
def test_a_marker_whose_data_never_came_is_one(out: Path, place: Path, name: str, data: bytes, present: bool) -> None:
    """The power went before it was on disk: what the tree was to hold is not known, what a stage holds is."""
    if present:
        lay(out, "old")
    lay_left(place / name, "another")
    (place / MARK).write_bytes(data)
    assert publish(out).warnings == ()
    assert (held_by(out), litter(out)) == (NEW, [])


# Whole JSON of another kind than mopt writes: it says nothing of what the old tree held.
_NONE = (
    '"replaces": [1, 2], "tree": null',
    '"replaces": [1, 2], "tree": []',
    '"replaces": [1, 2], "tree": 5',
    '"replaces": [1, 2], "tree": {"README.md": null}',
    '"replaces": [1, 2], "tree": {"README.md": [1, 2]}',
    '"replaces": [1, 2], "tree": {"README.md": [32768, "a", "b"]}',
    '"replaces": [1, 2], "tree": {"README.md": [32768, true, 1]}',
    '"replaces": 5, "tree": {}',
    '"replaces": [1], "tree": {}',
    '"replaces": ["a", "b"], "tree": {}',
    '"tree": 1',
    '"replaces": null, "tree": {}, "copies": 5',
    '"replaces": null, "tree": {}, "copies": [null]',
    '"replaces": null, "tree": {}, "copies": null',
    '"replaces": null, "tree": {}, "id": 5',
    '"replaces": null, "tree": {}, "id": null',
    '"replaces": null, "tree": {}, "stage": null',
    '"replaces": null, "tree": {}, "stage": ["a", 1]',
)


@pytest.mark.parametrize("words", _NONE)
@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
def test_a_marker_of_wrong_types_is_none(out: Path, place: Path, name: str, words: str) -> None:
    lay(out, "old"), lay_left(place / name, "another")
    (place / MARK).write_text(f'{{"schema": "mopt.stage/1", "id": "{NUMBER}", "copies": [], "stage": [1, 2], {words}}}')
    [warning] = publish(out).warnings
    assert name in warning and litter(out) == sorted([MARK, name])
    assert held_by(place / name) == files_of("another")


@pytest.mark.parametrize("present", [True, False], ids=["OUT stands", "OUT is absent"])
@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
@pytest.mark.parametrize("again", [False, True], ids=["another", "of the same inode"])
def test_another_folder_of_a_marked_name_is_left_alone(
    out: Path, place: Path, name: str, present: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it holds nothing but what mopt would write there; a file system gives inodes again."""
    if present:
        lay(out, "old")
    lay_left(place / name, "another")
    (place / name).rename(place.parent / "moved")
    lay(place / name, "another")
    if again:
        (inode, born), marked = identity_of(place.parent / "moved"), place / name
        real = leftovers.identity_of
        monkeypatch.setattr(leftovers, "identity_of", lambda one: (inode, born + 1) if one == marked else real(one))
    [warning] = publish(out).warnings
    assert f"{name} is left alone" in warning
    assert (held_by(out), litter(out), held_by(place / name)) == (NEW, sorted([MARK, name]), ANOTHER)


def test_a_folder_is_known_by_its_birth(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    before = identity_of(tmp_path / "one")
    (tmp_path / "one" / "file").touch()
    (tmp_path / "one").chmod(0o700)
    assert identity_of((tmp_path / "one").rename(tmp_path / "two")) == before
    assert abs(before[1] / 1e9 - time.time()) < 60


def test_another_folder_in_place_of_the_old_tree_is_left_alone(
    out: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came right after the exchange, under the name that the old tree has then."""
    lay(out, "old")
    real = directory.swap

    def swapped(*given: Any, **more: Any) -> Any:
        method, old = real(*given, **more)
        old.rename(place.parent / "moved")
        lay(old, "old")
        return method, old

    monkeypatch.setattr(directory, "swap", swapped)
    [warning] = publish(out).warnings
    assert "is left alone" in warning and held_by(out) == NEW
    [left] = [name for name in litter(out) if "stage" in name]
    assert held_by(place.parent / "moved") == held_by(place / left) == OLD


def test_a_file_that_comes_in_the_instant_of_the_swap_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = directory.swap

    def swapped(stage: Path, *given: Any, **more: Any) -> Any:
        (stage / "notes.md").write_bytes(b"mine")
        return real(stage, *given, **more)

    monkeypatch.setattr(directory, "swap", swapped)
    [warning] = publish(out).warnings
    assert "notes.md" in warning and held_by(out) == NEW | {"notes.md": b"mine"}


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "transformer"])
@pytest.mark.parametrize("plant", [a_file, a_fifo, a_link_to_nowhere, Path.mkdir])
def test_a_name_that_somebody_took_in_the_stage_is_said_to_be(
    out: Path, place: Path, name: str, plant: Callable[[Path], None]
) -> None:
    """No word of the disk; what was found is kept, though mopt gives such names."""
    with pytest.raises(StorageError) as refused, StagingDir(out, (), overwrite=False, need_bytes=0) as stage:
        plant(stage.path / name)
        if name == "transformer":
            stage.add_folder(name)
        elif name == "config.json":
            stage.write_file(name, b"ours")
        else:
            stage.shard(name, [])
    assert refused.value.code == "storage.stage_changed" and f"put {name} into" in refused.value.message
    [kept] = litter(out)
    assert refused.value.kept_at == str(place / kept) and kept in str(refused.value.hint)
    assert os.path.lexists(place / kept / name) and not out.exists()


def test_a_marker_speaks_of_its_own_run_alone(out: Path, place: Path) -> None:
    lay_left(place / LEFT, "another")
    mine = place / LEFT.replace(NUMBER, "aaaaaaaa")
    mine.mkdir()
    (mine / "config.json").write_bytes(b"mine")
    copy = Path(shutil.copy(place / MARK, place / MARK.replace(NUMBER, "aaaaaaaa")))
    assert read_marker(place / MARK) is not None and read_marker(copy) is None
    [warning] = publish(out).warnings
    assert mine.name in warning and (mine / "config.json").read_bytes() == b"mine"
    assert litter(out) == sorted([mine.name, MARK.replace(NUMBER, "aaaaaaaa")])


def test_a_huge_marker_is_not_read(out: Path, place: Path) -> None:
    with (place / MARK).open("wb") as file:
        file.truncate(5 << 30)
    begun = time.process_time()
    publish(out)
    assert litter(out) == [MARK] and time.process_time() - begun < 5


@pytest.mark.parametrize("data", [b"mine", b'{"schema": "mopt.stage/9"}', b"[]"])
def test_a_file_of_that_name_that_is_no_marker_stays(out: Path, place: Path, data: bytes) -> None:
    (place / MARK).write_bytes(data)
    publish(out)
    assert (held_by(out), litter(out), (place / MARK).read_bytes()) == (NEW, [MARK], data)


@pytest.mark.parametrize("name", ["attempts/0123456789abcdef", "transformer/config.json", "a.safetensors"])
def test_whatever_an_executor_leaves_is_swept(out: Path, place: Path, name: str) -> None:
    lay_left(place / LEFT, "another")
    (place / LEFT / name).parent.mkdir(exist_ok=True)
    (place / LEFT / name).write_bytes(b"half of it")
    assert publish(out).warnings == ()
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("name", ["attempts/notes", "notes.md", "vae/config.json", "transformer/deeper/config.json"])
@pytest.mark.parametrize("left", [LEFT, SET_ASIDE])
def test_what_no_executor_leaves_is_kept(out: Path, place: Path, left: str, name: str) -> None:
    lay(out, "old")
    lay_left(place / left, "another")
    (place / left / name).parent.mkdir(exist_ok=True, parents=True)
    (place / left / name).write_bytes(b"mine")
    [warning] = publish(out).warnings
    [kept] = litter(out)
    assert kept in warning and name in warning and (place / kept / name).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["my_lora.safetensors", "transformer/config.json", "config.json"])
def test_what_came_into_an_old_tree_after_a_kill_is_kept(out: Path, place: Path, name: str) -> None:
    """Of an old tree all is known, so a name as mopt gives it makes nothing mopt's."""
    lay(out, "old")
    lay_left(place / SET_ASIDE, "another")
    (place / SET_ASIDE / name).parent.mkdir(exist_ok=True)
    (place / SET_ASIDE / name).write_bytes(b"mine")
    [warning] = publish(out).warnings
    [kept] = litter(out)
    assert kept in warning and name in warning and (place / kept / name).read_bytes() == b"mine"


def test_an_exchanged_tree_is_known_by_its_inode(out: Path, place: Path) -> None:
    """Killed after the exchange: under the stage's name lies the old OUT, foreign files of which the user let go."""
    lay(out, "new")
    old = lay(place / LEFT, "old")
    (old / "train_log.json").write_text("consented to")
    (place / MARK).write_bytes(Marker(identity_of(old), look(old), number=NUMBER, stage=(0, 0)).to_bytes())
    (old / "my_lora.safetensors").write_text("came later")
    [warning] = publish(out).warnings
    [kept] = litter(out)
    assert "my_lora.safetensors" in warning and "train_log.json" not in warning
    (place / kept / "my_lora.safetensors").unlink()
    (place / kept).rename(place / LEFT)
    (place / MARK).write_bytes(
        Marker(identity_of(place / LEFT), look(place / LEFT), number=NUMBER, stage=(0, 0)).to_bytes()
    )
    assert publish(out).warnings == () and litter(out) == []


@pytest.mark.parametrize("name", [SET_ASIDE, LEFT])
def test_a_sweep_does_not_follow_links(out: Path, place: Path, name: str) -> None:
    """Not even out of a folder that is swept by right."""
    lay(out, "old")
    victim = lay(place.parent / "victim", "another")
    lay_left(place / name, "dead")
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
    assert "put another checkpoint there" in refused_as_changed(out, change)


def test_a_checkpoint_where_there_was_none(out: Path) -> None:
    refused_as_changed(out, lambda path: lay(path, "another"))


def refused_as_changed(out: Path, change: Callable[[Path], object]) -> str:
    """The message."""
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
    return error.message


def test_an_output_that_was_removed_meanwhile_is_made_new(out: Path) -> None:
    lay(out, "old")
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        shutil.rmtree(out)
        assert stage.publish().method == "rename"
    assert (held_by(out), litter(out)) == (NEW, [])
