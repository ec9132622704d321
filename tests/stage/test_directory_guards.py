"""Small guards of the stage, each of which is all that stands between a rare moment and a wrong claim. No torch."""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash_driver import COPIES, SHARD, files_of, fill, held_by, lay, refuse_with, stop
from stage_support import LEFT, MARK, before, lay_left, litter, locked, prepare, publish

from modelopt_convert.run.errors import Interrupted, OutputRefusedError, StorageError
from modelopt_convert.run.signals import stopping
from modelopt_convert.stage import fsops, sweep
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.locks import try_lock

OLD, NEW = files_of("old"), files_of("new")


@pytest.mark.parametrize("one", [SHARD, "config.json", "mopt.json", "transformer", "stage", "place"])
@pytest.mark.parametrize("method", ["rename", "two-renames"])
def test_one_thing_that_cannot_be_synced_is_enough(
    out: Path, monkeypatch: pytest.MonkeyPatch, method: str, one: str
) -> None:
    """What is synced after it does not make it durable."""
    prepare(method, out, monkeypatch)

    def fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == one or (one == "stage" and name.startswith(".out.mopt-stage-")):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        stage.add_folder("transformer")
        fill(stage, "new")
        assert stage.publish() == Published(method, durable=False, warnings=())  # type: ignore[arg-type]


def test_a_setgid_parent_hands_its_group_on(out: Path, place: Path) -> None:
    place.chmod(0o2755)
    publish(out)
    assert out.stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("present", [True, False])
def test_a_kernel_or_file_system_that_cannot_exchange(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int, present: bool
) -> None:
    if present:
        lay(out, "old")
    for name in ("exchange", "rename_noreplace"):
        monkeypatch.setattr(fsops, name, refuse_with(number))
    assert publish(out).method == ("two-renames" if present else "rename")
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("present", [True, False])
def test_a_c_library_without_renameat2(out: Path, monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    """glibc before 2.28."""
    if present:
        lay(out, "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name, use_errno: SimpleNamespace())
    assert publish(out).method == ("two-renames" if present else "rename")
    assert (held_by(out), litter(out)) == (NEW, [])


def test_a_stage_that_goes_between_the_listing_and_the_lock(
    out: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner has finished: nobody holds OUT."""
    lay_left(place / LEFT, "another")

    def lock(path: Path) -> int | None:
        if path.name == LEFT:
            shutil.rmtree(path)
        return try_lock(path)

    monkeypatch.setattr(sweep, "try_lock", lock)
    publish(out)
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("number", stopping())
def test_signals_wait_for_the_swap(out: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    lay(out, "old")
    before(monkeypatch, "exchange", lambda *_: os.kill(os.getpid(), number))
    previous = signal.signal(number, stop)
    try:
        with pytest.raises(Interrupted) as interrupted:
            publish(out)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)
    assert interrupted.value.signum == number
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("call", ["make_dir", "create_file"])  # of the stage; of the marker
@pytest.mark.parametrize("number", stopping())
def test_a_signal_right_after_something_is_made_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, call: str
) -> None:
    lay(out, "old")
    made = getattr(fsops, call)

    def strike(*words: Any) -> Any:
        found = made(*words)
        os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(fsops, call, strike)
    previous = signal.signal(number, stop)
    try:
        with pytest.raises(Interrupted):
            publish(out)
    finally:
        signal.signal(number, previous)
    assert (held_by(out), litter(out)) == (OLD, [])


def test_publishing_outside_the_main_thread(out: Path) -> None:
    """Only the main thread may set handlers, and only there do they run."""
    done: list[Published] = []
    thread = threading.Thread(target=lambda: done.append(publish(out)))
    thread.start()
    thread.join()
    assert [published.method for published in done] == ["rename"]
    assert held_by(out) == NEW


def test_a_kept_stage_whose_name_is_not_yet_on_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename worked and the fsync after it did not: the message must name where it stands, not where it stood."""
    lay(out, "old")

    def fail(path: Path) -> None:
        if path == out.parent and list(path.glob("out.mopt-kept-*")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(fsops, "exchange", refuse_with(errno.EBUSY))
    before(monkeypatch, "sync_dir", fail)
    with pytest.raises(StorageError) as failed:
        publish(out)
    assert failed.value.kept_at is not None
    assert held_by(Path(failed.value.kept_at)) == NEW
    [kept, mark] = sorted(litter(out), reverse=True)
    assert kept == Path(failed.value.kept_at).name and kept.startswith("out.mopt-kept-")
    assert mark.startswith(".out.mopt-mark-")
    monkeypatch.undo()
    publish(out)
    assert litter(out) == [kept]


def test_a_lock_is_never_taken_through_a_link(place: Path) -> None:
    """It would be that of somebody's folder, and the sweep that follows would be of that folder too."""
    (place / "victim").mkdir()
    (place / LEFT).symlink_to("victim")
    with pytest.raises(NotADirectoryError):
        try_lock(place / LEFT)


def test_a_stage_of_another_user_is_busy(out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not be opened may be alive."""
    lay_left(place / LEFT, "another")
    original = os.open

    def refuse(path: Path | str, flags: int, *mode: int, **how: int) -> int:
        if Path(path).name == LEFT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, flags, *mode, **how)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputRefusedError) as refused:
        publish(out)
    assert refused.value.code == "output.busy"
    monkeypatch.undo()
    assert litter(out) == [MARK, LEFT] and held_by(place / LEFT) == files_of("another")


def test_a_child_process_does_not_keep_the_lock(out: Path) -> None:
    """torch and the Hub's client start some that outlive a run."""
    with StagingDir(out, (), overwrite=False, need_bytes=1) as stage:
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        fill(stage, "new")
        stage.publish()
        with pytest.raises(BlockingIOError), locked(out):
            pytest.fail("a stage in place of OUT is still held by its run")
    try:
        with locked(out):  # only the child could hold it now
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_lock_is_held_while_the_stage_is_filled(out: Path) -> None:
    with StagingDir(out, (), overwrite=False, need_bytes=1) as stage:
        fd = os.open(stage.path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize("present", [True, False])
def test_a_run_without_descriptors_leaves_nothing(out: Path, present: bool, spare: int) -> None:
    """What ended it was that it could open nothing more: its stage is removed all the same."""
    if present:
        lay(out, "old")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        with (
            pytest.raises(StorageError, match="EMFILE"),
            StagingDir(out, (), overwrite=True, need_bytes=1, copies=COPIES) as stage,
        ):
            fill(stage, "new", ("transformer",))
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + spare, limits[1])
            )
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(spare):
                os.close(held.pop())
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    assert litter(out) == [] and held_by(out) == (OLD if present else {})
