"""Publishing when the disk, or somebody else, says no: what stands afterwards, and what the user is told. No torch."""

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from crash_driver import files_of, fill, held_by, lay, refuse_with, stop
from stage_support import Calls, before, forbid_renameat2, left_trees, litter, prepare, publish

from modelopt_convert.run.errors import ExitCode, StorageError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.directory import StagingDir

OLD, NEW = files_of("old"), files_of("new")
METHODS = ("rename", "exchange", "two-renames")
WRITES = ("create_file", "preallocate", "write_all", "sync", "close")


def failing(number: int, when: Callable[..., bool] = lambda *_: True) -> Callable[..., None]:
    """What raises an errno, as the kernel would, if ``when`` says so."""

    def fail(*values: object) -> None:
        if when(*values):
            raise OSError(number, os.strerror(number))

    return fail


def fails(out: Path, code: str) -> StorageError:
    """Publish, and return the StorageError this must give."""
    with pytest.raises(StorageError) as failed:
        publish(out)
    assert failed.value.exit_code == ExitCode.STORAGE
    assert failed.value.code == code
    return failed.value


def is_kept(out: Path, error: StorageError) -> None:
    """The finished checkpoint was kept whole under a name the user can see, and is all that was left."""
    assert error.kept_at is not None and error.hint is not None
    assert held_by(Path(error.kept_at)) == NEW
    assert litter(out) == [Path(error.kept_at).name]
    assert not litter(out)[0].startswith(".")
    assert error.kept_at in error.hint
    assert error.published is False


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", WRITES)
def test_a_write_that_fails(out: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """A full disk is exit code 5 with the path and the errno, not a bug of mopt; and nothing is left."""
    lay(out, "old")
    if call == "close":  # it must really close, or the test leaks
        monkeypatch.setattr(fsops, call, lambda fd: (os.close(fd), failing(number)()))
    else:
        before(monkeypatch, call, failing(number))
    error = fails(out, "storage.no_space" if number in {errno.ENOSPC, errno.EDQUOT} else "storage.failed")
    assert str(out.parent) in error.message and errno.errorcode[number] in error.message
    assert error.published is False and error.kept_at is None
    assert (held_by(out), litter(out)) == (OLD, [])


@pytest.mark.parametrize("call", ["make_dir", "set_mode", "sync_dir"])
def test_a_step_that_fails_before_the_swap(out: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    lay(out, "old")
    before(monkeypatch, call, failing(errno.EIO))
    error = fails(out, "storage.failed")
    assert str(out.parent) in error.message and "EIO" in error.message
    assert (held_by(out), litter(out)) == (OLD, [])


@pytest.mark.parametrize("nth", [1, 2])  # of the marker's folder; of the shard
def test_a_failed_fsync_is_not_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The kernel forgets the pages it could not write: a second fsync would succeed with the data gone."""
    lay(out, "old")
    tries: list[Path] = []

    def fsync(fd: int) -> None:
        tries.append(Path(f"/proc/self/fd/{fd}").readlink())
        if len(tries) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    fails(out, "storage.failed")
    assert tries[nth:] == [out.parent]  # for the removal of the stage
    assert (held_by(out), litter(out)) == (OLD, [])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
@pytest.mark.parametrize("which", ["files", "folders", "all"])
def test_a_file_system_without_fsync(out: Path, monkeypatch: pytest.MonkeyPatch, number: int, which: str) -> None:
    def fsync(fd: int) -> None:
        folder = Path(f"/proc/self/fd/{fd}").is_dir()
        if which == "all" or folder == (which == "folders"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    published = publish(out)
    assert (held_by(out), published.durable) == (NEW, False)


@pytest.mark.parametrize("at_most", [1, 7, 4096])
def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, data[:at_most], offset))
    publish(out)
    assert held_by(out) == NEW


def test_a_write_that_takes_nothing_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    assert "EIO" in fails(out, "storage.failed").message
    assert not out.exists() and litter(out) == []


def test_no_space_is_found_before_anything_is_written(out: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(out, "old")
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=2, f_frsize=4096, f_bfree=10**9))
    with pytest.raises(StorageError) as failed:
        publish(out, need_bytes=8193)
    assert (failed.value.code, failed.value.exit_code) == ("storage.no_space", ExitCode.STORAGE)
    assert "8193" in failed.value.message and "8192" in failed.value.message
    assert calls == [("make_dir", "stage"), ("remove_dir", "stage")]
    assert (held_by(out), litter(out)) == (OLD, [])
    publish(out, need_bytes=8192)


def test_a_lock_that_fails_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOLCK on NFS, for one."""
    lay(out, "old")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert "ENOLCK" in fails(out, "storage.failed").message
    assert (held_by(out), litter(out)) == (OLD, [])


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EIO, errno.EPERM], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["exchange", "rename_noreplace"])
def test_a_refused_swap_keeps_what_was_made(out: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Hours of checked work are not thrown away; EXDEV is what overlayfs says of a folder from a lower layer."""
    if call == "exchange":
        lay(out, "old")
    monkeypatch.setattr(fsops, call, refuse_with(number))
    error = fails(out, "storage.swap_refused")
    is_kept(out, error)
    assert os.strerror(number) in error.message
    assert held_by(out) == (OLD if call == "exchange" else {})
    monkeypatch.undo()
    publish(out)
    assert held_by(out) == NEW
    is_kept(out, error)  # later runs leave it alone


def test_what_cannot_be_renamed_at_all_stays_where_it_is_and_is_named(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(out, "old")
    for call in ("exchange", "rename"):
        monkeypatch.setattr(fsops, call, refuse_with(errno.EPERM))
    with pytest.raises(StorageError) as failed:
        publish(out)
    assert failed.value.published is False and failed.value.kept_at is not None
    assert held_by(Path(failed.value.kept_at)) == NEW and str(failed.value.kept_at) in str(failed.value.hint)
    assert held_by(out) == OLD and left_trees(out) == [Path(failed.value.kept_at).name]


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_signal_does_not_hide_where_the_work_was_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """SIGTERM while the swap is refused: the run ends anyway, and only its error says what stands where."""
    prepare(method, out, monkeypatch)
    fail = failing(errno.EBUSY, lambda source, target: target == out and "stage" in source.name)
    refused = "exchange" if method == "exchange" else "rename"
    with monkeypatch.context() as patch:
        before(patch, refused, lambda *paths: (os.kill(os.getpid(), signal.SIGTERM), fail(*paths)))
        previous = signal.signal(signal.SIGTERM, stop)
        try:
            error = fails(out, "storage.swap_refused")
        finally:
            signal.signal(signal.SIGTERM, previous)
    assert error.kept_at is not None
    assert (held_by(out), held_by(Path(error.kept_at))) == (OLD, NEW)


def test_a_failed_second_rename_undoes_the_first(out: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("two-renames", out, monkeypatch)
    inode = out.stat().st_ino
    before(monkeypatch, "rename", failing(errno.EBUSY, lambda source, target: target == out and "stage" in source.name))
    error = fails(out, "storage.swap_refused")
    is_kept(out, error)
    assert held_by(out) == OLD and out.stat().st_ino == inode
    first = calls.index(("rename", "out", "old"))
    kept = [("rename", "stage", "kept"), ("sync_dir", "."), ("remove_file", "mark")]
    assert calls[first + 1 :] == [("rename", "old", "out"), *kept]


def test_where_even_the_undoing_fails_the_user_is_told_where_the_old_one_is(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("two-renames", out, monkeypatch)
    with monkeypatch.context() as patch:
        before(patch, "rename", failing(errno.EIO, lambda _source, target: target == out))
        with pytest.raises(StorageError) as failed:
            publish(out)
    old = next(out.parent.glob(".out.mopt-old-*"))
    assert held_by(old) == OLD and not out.exists()
    assert old.name in f"{failed.value.message} {failed.value.hint}"
    with pytest.raises(ValueError, match="stop"), StagingDir(out, (), overwrite=True, need_bytes=1):
        assert held_by(out) == OLD
        raise ValueError("stop")


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_sync_after_the_swap(out: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """In place, but not known to be on disk: both trees are kept, and the message says where."""
    prepare(method, out, monkeypatch)
    with monkeypatch.context() as patch:
        before(patch, "sync_dir", failing(errno.EIO, lambda path: path == out.parent and held_by(out) == NEW))
        error = fails(out, "storage.sync_after_swap")
    assert error.published is True and error.kept_at is None
    assert held_by(out) == NEW
    assert [held_by(out.parent / name) for name in left_trees(out)] == ([] if method == "rename" else [OLD])
    assert all(name in error.message for name in left_trees(out))
    publish(out)
    assert (held_by(out), litter(out)) == (NEW, [])


def become_a_symlink(out: Path) -> None:
    out.rename(out.parent / "elsewhere")
    out.symlink_to("elsewhere")


def become_a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("mine")


def get_notes(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def listing(place: Path) -> dict[str, bytes | str]:
    """Everything below a folder but mopt's own."""
    paths = [path for path in place.rglob("*") if ".mopt-" not in str(path.relative_to(place))]
    return {str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in paths
            if path.is_symlink() or path.is_file()}  # fmt: skip


@pytest.mark.parametrize("change", [become_a_symlink, become_a_file, get_notes])
def test_an_output_that_changed_since_the_check(out: Path, change: Callable[[Path], None]) -> None:
    lay(out, "old")
    with pytest.raises(StorageError) as failed, StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        change(out)
        changed = listing(out.parent)
        stage.publish()
    assert listing(out.parent) == changed
    assert failed.value.kept_at is not None
    assert held_by(Path(failed.value.kept_at)) == NEW
    assert not [name for name in litter(out) if name.startswith(".")]


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("empty", [True, False])  # rename replaces an empty folder and says nothing
def test_an_output_that_appears_just_before_the_swap(
    out: Path, monkeypatch: pytest.MonkeyPatch, exclusive: bool, empty: bool
) -> None:
    if not exclusive:
        forbid_renameat2(monkeypatch)
    before(monkeypatch, "rename_noreplace", lambda *_: out.mkdir() if empty else lay(out, "another"))
    is_kept(out, fails(out, "storage.swap_refused"))
    assert held_by(out) == ({} if empty else files_of("another"))


def test_an_output_that_vanishes_just_before_the_swap(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(out, "old")
    before(monkeypatch, "exchange", lambda *_: shutil.rmtree(out))
    is_kept(out, fails(out, "storage.swap_refused"))
    assert not out.exists()


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_somebody_put_into_the_old_tree_outlives_it(
    out: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Put there after the last check, it cannot stop the swap; but neither this run nor the next may delete it."""
    prepare(method, out, monkeypatch)
    with monkeypatch.context() as patch:
        before(patch, "exchange", lambda *_: get_notes(out))  # tried first, also where it is then refused
        published = publish(out)
    assert held_by(out) == NEW
    [warning] = published.warnings
    [kept] = [path for path in out.parent.iterdir() if path != out]
    assert str(kept) in warning and "notes.txt" in warning
    assert held_by(kept) == OLD | {"notes.txt": b"mine"}
    publish(out)
    assert kept.exists(), "the warning said that it was kept"
    assert held_by(kept) == OLD | {"notes.txt": b"mine"}


def test_an_old_tree_that_cannot_be_removed_is_a_warning(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(out, "old")
    with monkeypatch.context() as patch:
        before(patch, "remove_tree", failing(errno.EACCES))
        published = publish(out)
    [warning] = published.warnings
    [left] = left_trees(out)
    assert left in warning and os.strerror(errno.EACCES) in warning
    assert held_by(out) == NEW
    publish(out)
    assert litter(out) == []


def test_nothing_in_the_stage_is_written_over(out: Path) -> None:
    with (
        pytest.raises(StorageError, match="EEXIST"),
        StagingDir(out, (), overwrite=True, need_bytes=1) as stage,
    ):
        stage.write_file("config.json", b"{}")
        stage.write_file("config.json", b"")
