"""What system and libraries say becomes an error with a documented code; what is left is a bug."""

import errno
import importlib
import os
from pathlib import Path

import pytest

import modelopt_convert
from modelopt_convert.commands.inspect import InspectCommand
from modelopt_convert.run.boundary import bounded, foreseen
from modelopt_convert.run.errors import ExitCode, InputError, InternalError, MoptError, StorageError

INPUT = Path("/in/export")
ROWS: list[tuple[Exception, str]] = [
    *((OSError(code, os.strerror(code), "/elsewhere/x"), "storage.failed") for code in (
        errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOENT)),
    *((OSError(code, os.strerror(code), "/elsewhere/x"), "storage.no_space") for code in (errno.ENOSPC, errno.EDQUOT)),
    *((OSError(code, os.strerror(code), "/in/export/x"), "storage.limits") for code in (
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)),
    *((OSError(code, os.strerror(code), path), "input.unreadable") for code in (errno.EACCES, errno.EIO, errno.ELOOP)
      for path in ("/in/export", "/in/export/config.json", b"/in/export/\xff", "/in/./export/x")),
    (OSError(errno.EACCES, "denied", "/in/export2/x"), "storage.failed"),
    (OSError("of a library, without a number"), "storage.failed"),
    (MemoryError(), "storage.limits"),
    (RuntimeError("can't start new thread"), "storage.limits"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
     "storage.limits"),
    (RuntimeError("Symlink loop from '/in/export'"), "storage.failed"),
    (RecursionError("maximum recursion depth exceeded"), "input.too_deep"),
    (ImportError("libx.so: failed to map segment from shared object", name="x"), "storage.library"),
    (RuntimeError("Could not determine home directory."), "storage.home"),
    (InputError("as it is", code="input.own"), "input.own"),
]  # fmt: skip
BUGS = [
    RuntimeError("something else"),
    ValueError("x"),
    ImportError("cannot import name", name="modelopt_convert.run"),
    KeyError("x"),
]


@pytest.mark.parametrize(("error", "code"), ROWS, ids=[f"{row[0]!r}"[:60] for row in ROWS])
def test_what_is_foreseen(error: Exception, code: str) -> None:
    found = foreseen(error, [INPUT])
    assert found is not None and found.code == code
    assert found.exit_code in (ExitCode.INPUT, ExitCode.STORAGE) and "\n" not in found.message
    if isinstance(error, OSError) and error.filename is not None:
        assert os.fsdecode(error.filename) in found.message and str(error.strerror) in found.message
        assert found.hint


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_what_can_only_be_a_bug_is_left_as_it_is(error: Exception) -> None:
    assert foreseen(error, [INPUT]) is None
    with pytest.raises(type(error)) as raised, bounded([]):
        raise error
    assert raised.value is error


def test_what_a_library_raises_while_it_is_imported_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("int('abc')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StorageError, match="'abc'") as caught, bounded([]):
        importlib.import_module("broken_library")
    assert caught.value.code == "storage.library"
    monkeypatch.setattr(modelopt_convert, "__path__", [*modelopt_convert.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="'abc'"), bounded([]):
        importlib.import_module("modelopt_convert.broken_library")  # its own code would be mopt's


def test_a_loop_of_links_is_named_as_the_system_names_it(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match=r"loop: Too many levels of symbolic links \(ELOOP\)"), bounded([]):
        (tmp_path / "loop").resolve()
        (tmp_path / "loop").stat()  # from Python 3.13 on, resolve() says nothing


def test_an_input_is_known_by_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    error = PermissionError(errno.EACCES, "denied", str(tmp_path / "real" / "x"))
    assert isinstance(foreseen(error, [tmp_path / "link"]), InputError)


def test_a_file_nested_too_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_words: object) -> None:
        raise RecursionError

    monkeypatch.setattr(InspectCommand, "run", fails)
    with pytest.raises(InputError) as raised:
        modelopt_convert.inspect(tmp_path)
    assert raised.value.code == "input.too_deep"


def test_a_function_of_the_api_raises_one_of_its_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_words: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path / "config.json"))

    monkeypatch.setattr(InspectCommand, "run", fails)
    with pytest.raises(MoptError) as raised:
        modelopt_convert.inspect(tmp_path)
    assert (raised.value.code, raised.value.exit_code) == ("input.unreadable", ExitCode.INPUT)
    assert raised.value.report.exit_code == ExitCode.INPUT and isinstance(raised.value.__cause__, OSError)


def test_what_stands_is_said_whatever_fails_after_it() -> None:
    from modelopt_convert.commands.command import output_report
    from modelopt_convert.stage.directory import Published

    stands = Published("rename", True, ())
    assert output_report("out", {}, {}, stands, StorageError("late", code="storage.limits")).published
    assert not output_report("out", {}, {}, None, InternalError("early", code="internal")).published
