"""Publishing: what replaces what, in which order, and what a run does with what other runs left. No torch."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from itertools import combinations, groupby
from pathlib import Path

import pytest
from crash_driver import SHARD, files_of, fill, held_by, lay
from stage_support import (
    LEFT,
    MARK,
    SET_ASIDE,
    Calls,
    before,
    forbid_renameat2,
    lay_left,
    left_trees,
    litter,
    locked,
    prepare,
    publish,
)
from tracing import driver, run

from modelopt_convert.checkpoint.header import parse_header, read_header_length
from modelopt_convert.run.errors import ExitCode, Interrupted, OutputRefusedError
from modelopt_convert.stage import directory, fsops, sweep
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.locks import file_system_of

OLD, NEW = files_of("old"), files_of("new")
METHODS = ("rename", "exchange", "two-renames")


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("method", METHODS)
def test_published(out: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    prepare(method, out, monkeypatch)
    published = publish(out, overwrite=method != "rename")
    assert (published.method, published.durable, published.warnings) == (method, True, ())
    assert held_by(out) == NEW
    assert litter(out) == []


def test_the_tiny_checkpoint_is_a_safetensors_file() -> None:
    """Else what these tests call whole would not be."""
    data = NEW[SHARD]
    size = read_header_length(data[:8], file=SHARD, file_bytes=len(data))
    tensors = parse_header(data[8 : 8 + size], file=SHARD, file_bytes=len(data)).tensors
    assert sorted(tensors) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("method", METHODS)
def test_order_of_what_reaches_the_disk(out: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Each fsync stands where a power cut could otherwise tear the result; the old tree goes last."""
    prepare(method, out, monkeypatch)
    publish(out)
    swap = {
        "rename": [("rename_noreplace", "stage", "out")],
        "exchange": [("exchange", "stage", "out")],
        "two-renames": [("rename", "out", "old"), ("rename", "stage", "out")],
    }[method]
    tree = {"rename": [], "exchange": ["stage"], "two-renames": ["old"]}[method]
    removal = [call for one in tree for call in (("remove_tree", one), ("sync_dir", "."))]
    end = [("set_mode", "stage"), ("sync_dir", "stage"), *swap, ("sync_dir", "."), *removal, ("remove_file", "mark")]
    begin = [("make_dir", "stage"), *((call, "mark") for call in ("create_file", "write_all", "close"))]
    begin.append(("sync_dir", "."))
    assert calls[: len(begin)] == begin
    assert calls[-len(end) :] == end
    written = calls[len(begin) : -len(end)]
    assert {path for _, path in written} == {f"stage/{name}" for name in NEW}
    for name in NEW:
        steps = [step for step, _ in groupby(call for call, path in written if path == f"stage/{name}")]
        reserved = ["preallocate"] if name == SHARD else []
        assert steps == ["create_file", *reserved, "write_all", "sync", "close"]


def test_absent_output_where_no_rename_can_be_exclusive(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_renameat2(monkeypatch)
    assert publish(out, overwrite=False).method == "rename"
    assert (held_by(out), litter(out)) == (NEW, [])


def test_modes_of_a_new_output_follow_the_umask(out: Path, umask: int) -> None:
    publish(out)
    assert mode_of(out) == 0o777 & ~umask
    assert {mode_of(path) for path in out.iterdir()} == {0o666 & ~umask}
    assert os.umask(umask) == umask


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_mode_of_the_replaced_folder_is_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch, umask: int, method: str
) -> None:
    prepare(method, out, monkeypatch)
    out.chmod(0o2751)
    publish(out)
    assert mode_of(out) == 0o2751


def test_the_stage_is_private_and_on_the_same_file_system(out: Path) -> None:
    with StagingDir(out, (), overwrite=False, need_bytes=1) as stage:
        assert stage.path.parent == out.parent
        assert mode_of(stage.path) == 0o700
        assert stage.path.name.startswith(".out.mopt-stage-")
    assert litter(out) == []


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), Interrupted(15)], ids=lambda one: repr(one))
def test_an_error_leaves_nothing(out: Path, error: BaseException, present: bool) -> None:
    if present:
        lay(out, "old")
    with pytest.raises(type(error)), StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        raise error
    assert held_by(out) == (OLD if present else {})
    assert out.exists() == present
    assert litter(out) == []


def test_leaving_without_publishing_leaves_nothing(out: Path) -> None:
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
    assert not out.exists() and litter(out) == []


def test_while_one_run_writes_another_is_refused(out: Path) -> None:
    lay(out, "old")
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        with pytest.raises(OutputRefusedError) as refused, StagingDir(out, (), overwrite=True, need_bytes=1):
            pytest.fail("two runs hold one output")
        assert (refused.value.code, refused.value.exit_code) == ("output.busy", ExitCode.OUTPUT)
        assert left_trees(out) == [stage.path.name]
        stage.publish()
    assert (held_by(out), litter(out)) == (NEW, [])


def test_a_held_stage_is_busy_and_a_dead_one_is_swept(out: Path, place: Path, calls: Calls) -> None:
    lay(out, "old")
    lay_left(place / LEFT, "another")
    with locked(place / LEFT), pytest.raises(OutputRefusedError, match=r"0badcafe") as refused:
        publish(out)
    assert refused.value.code == "output.busy"
    assert (held_by(out), litter(out), held_by(place / LEFT)) == (
        OLD,
        [MARK, LEFT],
        files_of("another"),
    )
    calls.clear()
    publish(out)
    assert (held_by(out), litter(out)) == (NEW, [])
    # What is swept may be the old tree of a swap that never reached the disk.
    swept = [("sync_dir", "."), ("remove_tree", LEFT), ("sync_dir", "."), ("remove_file", MARK)]
    assert calls[:5] == [("make_dir", "stage"), *swept]


def test_a_failed_sync_keeps_the_dead_stage(out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(out, "old")
    lay_left(place / LEFT, "another")

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    before(monkeypatch, "sync_dir", fail)
    with pytest.raises(directory.StorageError):
        publish(out)
    assert (held_by(out), held_by(place / LEFT)) == (OLD, files_of("another"))


def test_where_locks_prove_nothing_nothing_is_swept(out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_left(place / LEFT, "another")
    monkeypatch.setattr(sweep, "file_system_of", lambda _path: "nfs4")
    with pytest.raises(OutputRefusedError) as refused:
        publish(out)
    assert refused.value.code == "output.busy"
    assert refused.value.hint is not None and str(place / LEFT) in refused.value.hint
    assert litter(out) == [MARK, LEFT]


@pytest.mark.parametrize("name", ["out*", "o[u]t", "o?t", "out\n", "-out", "~", "öut"])
def test_only_what_belongs_to_this_output_is_swept(place: Path, name: str) -> None:
    others = [LEFT, SET_ASIDE, ".outer.mopt-stage-0badcafe", ".o.mopt-stage-0badcafe", ".oxt.mopt-stage-0badcafe"]
    for other in others:
        lay_left(place / other, "another")
    left = sorted(os.listdir(place))
    assert len(left) == len(others) + 4  # the first two are of one run
    lay_left(place / f".{name}.mopt-stage-0badcafe", "dead")
    publish(place / name)
    assert held_by(place / name) == NEW
    assert sorted(os.listdir(place)) == sorted([*left, name])


def test_a_swap_cut_in_two_is_rolled_back(out: Path, place: Path, calls: Calls) -> None:
    lay_left(place / SET_ASIDE, "old")
    with pytest.raises(OutputRefusedError) as refused:
        publish(out, overwrite=False)
    assert refused.value.code == "output.exists"
    assert (held_by(out), litter(out)) == (OLD, [])
    recovered = [("rename", SET_ASIDE, "out"), ("sync_dir", "."), ("remove_file", MARK)]
    assert calls == [("make_dir", "stage"), *recovered, ("remove_dir", "stage")]


def test_a_swap_cut_in_two_is_rolled_back_and_then_replaced(out: Path, place: Path) -> None:
    lay_left(place / SET_ASIDE, "old")
    with pytest.raises(ValueError, match="stop"), StagingDir(out, (), overwrite=True, need_bytes=1):
        assert held_by(out) == OLD
        raise ValueError("stop")
    assert publish(out).method == "exchange"
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("gone", [names for size in (1, 2, 3) for names in combinations(sorted(OLD), size)])
def test_what_was_being_removed_is_not_put_back(gone: tuple[str, ...], out: Path, place: Path) -> None:
    """A run was killed while it removed what it had replaced, and then the user deleted OUT."""
    lay_left(place / SET_ASIDE, "old")
    for name in gone:
        (place / SET_ASIDE / name).unlink()
    assert publish(out, overwrite=False).method == "rename"
    assert (held_by(out), litter(out)) == (NEW, [])


def test_an_old_tree_beside_the_new_is_swept(out: Path, place: Path, calls: Calls) -> None:
    lay(out, "another")
    lay_left(place / SET_ASIDE, "old")
    publish(out)
    assert (held_by(out), litter(out)) == (NEW, [])
    swept = [("sync_dir", "."), ("remove_tree", SET_ASIDE), ("sync_dir", "."), ("remove_file", MARK)]
    assert calls[:5] == [("make_dir", "stage"), *swept]


def test_a_stage_swept_before_it_was_locked_is_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may take the new stage for a dead one in the instant before it is locked."""
    made: list[Path] = []
    make_dir, flock = fsops.make_dir, fcntl.flock

    def make(path: Path, mode: int) -> None:
        make_dir(path, mode)
        made.append(path)
        if len(made) == 1:  # gone before it is opened
            path.rmdir()

    def lock(fd: int, how: int) -> None:
        if len(made) == 2:  # gone before it is locked, with another folder under its name
            made[1].rmdir()
            made[1].mkdir()
            made.append(made[1])
        flock(fd, how)

    monkeypatch.setattr(fsops, "make_dir", make)
    monkeypatch.setattr(fcntl, "flock", lock)
    with StagingDir(out, (), overwrite=False, need_bytes=1) as stage:
        assert made[-1] == stage.path and stage.path not in made[:-1]
        with pytest.raises(OutputRefusedError, match="another mopt"):
            publish(out)
    assert litter(out) == []


@pytest.mark.parametrize("method", METHODS[1:])
def test_another_run_while_the_old_tree_is_being_removed(
    out: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """To that run the old tree is litter of a dead one: it may sweep it or call it busy, and neither may complain."""
    prepare(method, out, monkeypatch)
    others: list[object] = []

    def another_run(_tree: Path) -> None:
        if not others:
            others.append("runs")
            try:
                others[0] = publish(out).warnings
            except OutputRefusedError as error:
                others[0] = error.code

    before(monkeypatch, "remove_tree", another_run)
    published = publish(out)
    assert others[0] in {(), "output.busy"}
    assert published.warnings == ()
    assert (held_by(out), litter(out)) == (NEW, [])


@pytest.mark.parametrize("thread", [[], ["--thread"]], ids=["alone", "beside a thread"])
@pytest.mark.parametrize("method", METHODS)
def test_a_signal_waits_for_the_swap(out: Path, method: str, thread: list[str]) -> None:
    """SIGTERM comes right after the rename that takes OUT away. numpy and torch start threads, and a signal to the
    process goes to any thread that does not block it; Python then runs the handler in the main thread all the same."""
    if method != "rename":
        lay(out, "old")
    switches = ["--two-renames"] if method == "two-renames" else []
    ended = run(driver(out, "new", "--signal", *switches, *thread))
    assert (held_by(out), litter(out)) == (NEW, [])
    assert ended.code == ExitCode.TERMINATED, ended
    assert ended.told["in_place"] is True


@pytest.mark.parametrize(
    ("line", "folder", "kind"),
    [
        ("40 1 0:1 / / rw - ext4 /dev/a rw", "/models", "ext4"),
        ("41 40 0:2 / /net\\040drive rw - nfs4 host:/x rw", "/net drive/models", "nfs4"),
        ("41 40 0:2 / /café rw - nfs4 host:/x rw", "/café/models", "nfs4"),
        ("41 40 0:2 / /caf\udce9 rw - nfs4 host:/x rw", "/caf\udce9/models", "nfs4"),
        ("41 40 0:2 / /caf\udce9 rw - nfs4 host:/x rw", "/models", "ext4"),
        (
            "41 40 0:2 / /models rw shared:1 master:2 - fuse.sshfs x rw\n42 40 0:3 / /models rw - xfs y rw",
            "/models",
            "xfs",
        ),
    ],
)
def test_file_system_type_by_mount_point(monkeypatch: pytest.MonkeyPatch, line: str, folder: str, kind: str) -> None:
    """Where it is taken for a local one, the live stage of another host would be swept."""
    table = f"39 1 0:1 / / rw - ext4 /dev/a rw\n{line}\n"
    monkeypatch.setattr(Path, "read_bytes", lambda _path: table.encode(errors="surrogateescape"))
    assert file_system_of(Path(folder)) == kind
