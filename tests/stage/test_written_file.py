"""Reports and pages: what they never overwrite, and what stands there when something goes wrong."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_driver import lay
from own_mounts import in_own_mounts
from stage_support import before
from support import run_mopt

from modelopt_convert.run.errors import ExitCode, OutputRefusedError, StorageError
from modelopt_convert.stage import fsops, written_file
from modelopt_convert.stage.written_file import (
    PAGE_HEAD,
    SHEET_HEAD,
    check_file_place,
    check_file_replaced,
    is_same_place,
    write_report,
)

REPORT = '{"schema":"mopt.report/1","status":"ok"}\n'
INSPECT = '{"schema":"mopt.inspect/1"}\n'
LEFT = ".mopt-report-0badcafe"
OURS = {
    "report": REPORT,
    "inspect": INSPECT,
    "indented": json.dumps(json.loads(REPORT), indent=2),
    "page": f"{PAGE_HEAD}<title>x</title></html>",
    "empty": "",
    "a comparison": '{"schema":"mopt.fidelity/1"}',
    "a sheet": f"{SHEET_HEAD}</html>\n",
}
FOREIGN = {
    "text": "mine",
    "json": '{"mine": 1}',
    "a record": '{\n  "schema": "mopt.manifest/1"\n}\n',
    "a later key": '{"mine": 1, "schema": "mopt.report/1"}',
    "another page": "<!DOCTYPE html>\n<html></html>",
    "a page of another": PAGE_HEAD.replace("mopt", "me"),
    "a report and notes": '{"schema":"mopt.report/1"}\nmy notes',
    "notes without an end": '{"schema":"mopt.report/1", my notes',
    "a page and notes": f"{PAGE_HEAD}</html>\nmy notes",
    "a list": '[{"schema":"mopt.report/1"}]',
    "blank": " \n",
    "zeros": "\0" * 9,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "report.json"


def beside(file: Path) -> list[str]:
    return sorted(set(os.listdir(file.parent)) - {file.name})


@pytest.mark.parametrize("old", [None, *OURS])
def test_what_mopt_wrote_is_replaced(file: Path, old: str | None) -> None:
    if old is not None:
        file.write_text(OURS[old])
        file.chmod(0o640)
    other = file.with_name("other name")
    if old is not None:
        other.hardlink_to(file)
    write_report(file, "new, é")
    assert file.read_text(encoding="utf-8") == "new, é"
    if old is not None:
        assert other.read_text() == OURS[old], "written through a hard link"
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert beside(file) == ([] if old is None else ["other name"])


def refused(file: Path) -> None:
    before = file.lstat()
    for call in (check_file_replaced, lambda path: write_report(path, REPORT)):
        with pytest.raises(OutputRefusedError) as error:
            call(file)
        assert (error.value.code, error.value.exit_code) == ("report.foreign", ExitCode.OUTPUT)
        assert str(file) in error.value.message and error.value.hint
    after = file.lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_mopt_did_not_write_is_refused(file: Path, kind: str) -> None:
    file.write_text(FOREIGN[kind])
    refused(file)
    assert file.read_text() == FOREIGN[kind] and beside(file) == []


def a_link(file: Path) -> None:
    file.with_name("real").write_text(REPORT)
    file.symlink_to("real")


def a_dangling_link(file: Path) -> None:
    file.symlink_to("nowhere")


def a_folder(file: Path) -> None:
    file.mkdir()


def a_fifo(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("make", [a_link, a_dangling_link, a_folder, a_fifo])
def test_what_is_no_plain_file_is_refused(file: Path, make: Callable[[Path], None]) -> None:
    make(file)
    refused(file)
    assert not os.path.lexists(file.with_name("nowhere"))


def test_a_device_is_refused() -> None:
    with pytest.raises(OutputRefusedError):
        write_report(Path("/dev/null"), REPORT)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_is_put_there_meanwhile_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before(monkeypatch, "sync", lambda _fd: file.write_text("mine"))
    with pytest.raises(OutputRefusedError):
        write_report(file, REPORT)
    assert file.read_text() == "mine" and beside(file) == []


def test_what_is_put_there_in_the_last_instant_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before(monkeypatch, "rename_noreplace", lambda *_: file.write_text("mine"))
    with pytest.raises(StorageError, match="EEXIST"):
        write_report(file, REPORT)
    assert file.read_text() == "mine" and beside(file) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["create_file", "write_all", "sync", "rename"])
def test_a_disk_that_fails_leaves_the_old_report(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    file.write_text(REPORT)
    before(monkeypatch, call, fail)
    with pytest.raises(StorageError, match=errno.errorcode[number]) as failed:
        write_report(file, INSPECT)
    assert str(file) in failed.value.message
    assert file.read_text() == REPORT and beside(file) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_no_rename_is_exclusive(file: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsops, "rename_noreplace", fail)
    write_report(file, REPORT)
    assert file.read_text() == REPORT and beside(file) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from modelopt_convert.stage import fsops, written_file
name, path = sys.argv[1:]
original = getattr(fsops, name)
setattr(fsops, name, lambda *values: os.kill(os.getpid(), signal.SIGKILL))
written_file.write_report(Path(path), '{"schema":"mopt.report/1"}')
"""


@pytest.mark.parametrize("call", ["write_all", "sync", "rename", "close"])
def test_what_a_killed_run_left_is_swept(file: Path, call: str) -> None:
    file.write_text(REPORT)
    done = subprocess.run([sys.executable, "-c", KILLED, call, file], check=False)
    assert done.returncode == -9
    assert file.read_text() in {REPORT, '{"schema":"mopt.report/1"}'}
    assert call == "close" or len(beside(file)) == 1
    write_report(file, INSPECT)
    assert (file.read_text(), beside(file)) == (INSPECT, [])


@pytest.mark.parametrize("data", [b"mine", b"\0\0", b'{"schema":"mopt.manifest/1"}'])
def test_what_is_not_left_by_mopt_is_not_swept(file: Path, data: bytes) -> None:
    file.with_name(LEFT).write_bytes(data)
    file.with_name(".mopt-report-mine").write_text(REPORT)
    file.with_name(".mopt-report-0badcaf0").symlink_to(file.name)
    write_report(file, REPORT)
    assert beside(file) == [".mopt-report-0badcaf0", LEFT, ".mopt-report-mine"]
    assert file.with_name(LEFT).read_bytes() == data


def test_what_another_run_is_writing_is_not_swept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = file.with_name(LEFT)
    left.write_text(REPORT)
    with left.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_report(file, REPORT)
        assert beside(file) == [LEFT]
    monkeypatch.setattr(written_file, "file_system_of", lambda _path: "nfs4")
    write_report(file, REPORT)
    assert beside(file) == [LEFT], "locks prove nothing there"
    monkeypatch.undo()
    write_report(file, REPORT)
    assert beside(file) == []


def test_a_file_swept_before_it_was_locked_is_made_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    create = fsops.create_file

    def create_file(path: Path, mode: int | None = None) -> int:
        fd = create(path, mode)
        made.append(path)
        if len(made) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(fsops, "create_file", create_file)
    write_report(file, REPORT)
    assert len(made) == 2 and file.read_text() == REPORT and beside(file) == []


def spellings(top: Path) -> dict[str, Path]:
    """Other names for a report in the input, or for the input."""
    model = lay(top / "model", "old")
    (top / "link").symlink_to(model)
    (top / "preset.toml").write_text("x")
    (top / "hard.toml").hardlink_to(top / "preset.toml")
    (top / "to.json").symlink_to(model / "config.json")
    return {
        "inside": model / "report.json",
        "a file of it": model / "config.json",
        "by ..": top / "other" / ".." / "model" / "report.json",
        "by a link": top / "link" / "report.json",
        "a link to a file of it": top / "to.json",
        "the preset": top / "preset.toml",
        "a hard link of the preset": top / "hard.toml",
        "the output itself": top / "out",
        "the output, by ..": top / "other" / ".." / "out",
        "a folder": top / "other",
        "no folder": top / "no" / "such.json",
        "too long a name": top / ("x" * 300),
    }


def test_no_report_stands_in_an_input_under_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name, path in spellings(tmp_path).items():
        with pytest.raises(OutputRefusedError) as refused:
            check_file_place(path, [tmp_path / "model", tmp_path / "preset.toml", tmp_path / "out", tmp_path / "gone"])
        assert refused.value.code == "report.place" and str(path) in refused.value.message, name
    check_file_place(tmp_path / "report.json", [tmp_path / "model", tmp_path / "preset.toml", tmp_path / "out"])


def failing(monkeypatch: pytest.MonkeyPatch, below: Path, number: int) -> None:
    """The system says nothing of what lies there."""
    real = os.stat

    def stat(path: Any, *more: Any, **how: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).is_relative_to(below):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **how)

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_an_input_that_cannot_be_looked_at_is_not_the_report_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "private").mkdir()
    lay(tmp_path / "private" / "model", "old")
    failing(monkeypatch, tmp_path / "private" / "model", number)
    report = tmp_path / "report.json"
    check_file_place(report, [tmp_path / "private" / "model", tmp_path / "private" / "model" / "config.json"])
    ended = run_mopt("inspect", tmp_path / "private" / "model", "--report-json", report)
    assert ended.exit_code == 3 and ended.report is not None and ended.report["error"]["code"].startswith("input.")
    assert json.loads(report.read_bytes()) == ended.report


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_place_that_cannot_be_looked_at_is_the_storage_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "there").mkdir()
    failing(monkeypatch, tmp_path / "there", number)
    with pytest.raises(StorageError, match=os.strerror(number)):
        check_file_place(tmp_path / "there" / "report.json", [])


def test_a_usage_error_forges_no_line(tmp_path: Path) -> None:
    for name in ("nod\nerror: fake", "x\u2028y", "x\x0cy", "x\x1b[2Jy"):
        ended = run_mopt("inspect", tmp_path, "--report-json", tmp_path / name / "report.json", json_report=False)
        assert ended.exit_code == 2 and name not in ended.stderr and "\x1b[2J" not in ended.stderr


def test_no_report_is_written_through_a_mount(tmp_path: Path) -> None:
    found = in_own_mounts(
        tmp_path,
        """
from crash_driver import lay
from modelopt_convert.run.errors import MoptError
from modelopt_convert.stage.written_file import check_file_place, is_same_place, write_report

def told(path):
    try:
        check_file_place(path, [model])
        write_report(path, "new")
    except MoptError as error:
        return error.code
    return "written"

model = lay(top / "model", "old")
(model / "deep").mkdir()
(top / "whole").mkdir()
(top / "part").mkdir()
mount("--bind", model, top / "whole")
mount("--bind", model / "deep", top / "part")
for name, data in (("a", "mine"), ("b", '{"schema":"mopt.report/1"}')):
    (top / name).write_text(data)
    (top / f"on {name}").touch()
    mount("--bind", top / name, top / f"on {name}")
(top / "on config").touch()
mount("--bind", model / "config.json", top / "on config")
cases = [told(top / "whole" / "r.json"), told(top / "part" / "r.json"), told(top / "on a"), told(top / "on b")]
cases += [told(top / "on config"), told(top / "free")]
cases.append(is_same_place(top / "whole" / "r.json", model / "r.json"))
print(json.dumps([cases, (top / "a").read_text(), (top / "b").read_text(), (model / "config.json").read_text()]))
""",
    )
    assert found == [
        ["report.place", "report.place", "report.foreign", "report.foreign", "report.place", "written", True],
        "mine",
        '{"schema":"mopt.report/1"}',
        '{"version": "old"}',
    ]


def test_a_folder_that_may_not_be_listed_takes_a_report(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        write_report(file, REPORT)
    assert file.read_text() == REPORT and beside(file) == []


def test_one_place_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for other in ("a/../a/x", "link/x", str(tmp_path / "a" / "x"), "./a/x"):
        assert is_same_place(Path("a/x"), Path(other))
    assert not is_same_place(Path("a/x"), Path("a/y")) and not is_same_place(Path("a/x"), Path("x"))
    Path("a/x").touch()
    Path("y").hardlink_to("a/x")
    assert is_same_place(Path("a/x"), Path("y"))
    shutil.rmtree("a")
    assert is_same_place(Path("a/x"), Path("a/x"))
