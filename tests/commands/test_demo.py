"""mopt demo: what comes with mopt is built as files of a user's are, and nothing is replaced."""

import errno
import json
import signal
import zipfile
from importlib import resources
from pathlib import Path

import pytest
from support import run_mopt, tree

from modelopt_convert.commands.demo import demo_files

_LARGEST = 1_000_000
ARCHIVE = resources.files("modelopt_convert.commands") / "demo.zip"


def test_what_comes_with_mopt_is_small_and_says_nothing_of_who_made_it() -> None:
    with resources.as_file(ARCHIVE) as path, zipfile.ZipFile(path) as archive:
        assert path.stat().st_size <= _LARGEST
        assert {name.partition("/")[0] for name in archive.namelist()} == {"base", "export"}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    assert texts and not [text for text in texts if b'"/' in text]  # no path of the machine that made them


def test_the_demo_ends_with_what_to_look_at(tmp_path: Path) -> None:
    """Proven, and each command that it names ends well."""
    folder = tmp_path / "new"
    told = run_mopt("demo", folder, json_report=False)
    assert told.exit_code == 0 and told.stdout.startswith("proven\n"), told.stderr
    assert {path.name for path in folder.iterdir()} == {"base", "export", "out"}
    assert {"config.json", "mopt.json", "README.md"} < {path.name for path in (folder / "out").iterdir()}
    commands = [line.partition(": mopt ")[2] for line in told.stdout.splitlines() if ": mopt " in line]
    assert {line.split()[0] for line in commands} == {"inspect", "build-nvfp4"}
    assert told.stdout.count("next: ") == 1
    for line in commands:
        words = [
            word.replace(f"{folder}/out", f"{tmp_path}/again") if "build" in line else word for word in line.split()
        ]
        again = run_mopt(*words)
        assert again.exit_code == 0, again.stderr
    assert tree(tmp_path / "again") == tree(folder / "out")


@pytest.mark.parametrize(
    ("name", "code"), [("folder", "output.exists"), ("file", "output.exists"), ("gone/new", "output.no_parent")]
)
def test_the_demo_replaces_nothing(tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    told = run_mopt("demo", tmp_path / name, json_report=False)
    assert told.exit_code == 4 and f"[{code}]" in told.stderr and "hint: " in told.stderr
    assert tree(tmp_path) == before and told.stdout == ""


def test_the_demo_is_told_as_builds_are(tmp_path: Path) -> None:
    """One report with ``--json``, also of a refusal; nothing with ``-q``."""
    told = run_mopt("demo", tmp_path / "new", "--json", json_report=False)
    report = json.loads(told.stdout)
    assert (report["command"], report["status"], report["proof"]["words"]) == ("build-nvfp4", "ok", "proven")
    again = run_mopt("demo", tmp_path / "new", "--json", json_report=False)
    report = json.loads(again.stdout)
    assert (report["command"], report["exit_code"], report["error"]["code"]) == ("demo", 4, "output.exists")
    assert again.exit_code == 4 and "[output.exists]" in again.stderr
    quiet = run_mopt("demo", tmp_path / "other", "-q", json_report=False)
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["zipfile.ZipFile.extractall", "modelopt_convert.stage.fsops.write_all"])
def test_a_demo_that_fails_leaves_nothing_and_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """On a full disk, while the inputs are made and while OUT is; what somebody else put there meanwhile stays."""
    with monkeypatch.context() as full:
        full.setattr(where, _full)
        told = run_mopt("demo", tmp_path / "new", json_report=False)
    assert told.exit_code == 5 and "[storage.no_space]" in told.stderr and "hint: free some space" in told.stderr
    assert not list(tmp_path.iterdir())
    assert run_mopt("demo", tmp_path / "new", json_report=False).exit_code == 0


def test_a_demo_that_fails_removes_only_what_it_made(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), demo_files(folder):
        (folder / "base" / "mine").write_text("mine")
        raise KeyboardInterrupt
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / "base" / "mine"]


def test_a_demo_that_is_stopped_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extract = zipfile.ZipFile.extractall

    def stopped(archive: zipfile.ZipFile, folder: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        extract(archive, folder)

    monkeypatch.setattr("zipfile.ZipFile.extractall", stopped)
    told = run_mopt("demo", tmp_path / "new", json_report=False)
    assert told.exit_code == 130 and "[interrupted]" in told.stderr
    assert not list(tmp_path.iterdir())
