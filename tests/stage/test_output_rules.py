"""What mopt refuses to write to, before it has changed anything. No torch."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import files_of, held_by, lay
from stage_support import publish, with_record

from modelopt_convert.run.errors import ExitCode, OutputRefusedError
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.ownership import look


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Mode, mtime and content of everything below a folder, links unread."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = (status.st_mode, status.st_mtime_ns, content)
    return found


Row = tuple[Path, list[Path]]


def a_symlink(top: Path) -> Row:
    lay(top / "real", "old")
    (top / "out").symlink_to("real")
    return top / "out", []


def a_dangling_symlink(top: Path) -> Row:
    (top / "out").symlink_to("nowhere")
    return top / "out", []


def a_missing_parent(top: Path) -> Row:
    return top / "missing" / "out", []


def a_file_as_parent(top: Path) -> Row:
    (top / "file").touch()
    return top / "file" / "out", []


def the_input(top: Path) -> Row:
    return lay(top / "out", "old"), [top / "out"]


def the_input_by_a_link(top: Path) -> Row:
    (top / "export").symlink_to(lay(top / "out", "old"))
    return top / "out", [top / "export"]


def the_input_by_a_linked_parent(top: Path) -> Row:
    (top / "real").mkdir()
    lay(top / "real" / "model", "old")
    (top / "linked").symlink_to("real")
    return top / "linked" / "model", [top / "real" / "model"]


def inside_the_input(top: Path) -> Row:
    return lay(top / "export", "old") / "out", [top / "export"]


def inside_the_second_input(top: Path) -> Row:
    lay(top / "export", "old")
    return lay(top / "base", "old") / "deep" / ".." / "out", [top / "export", top / "base"]


def deep_inside_the_input(top: Path) -> Row:
    (lay(top / "export", "old") / "a" / "b").mkdir(parents=True)
    return top / "export" / "a" / "b" / "out", [top / "export"]


def around_the_input(top: Path) -> Row:
    lay(top / "out", "old")
    return top / "out", [lay(top / "out" / "transformer", "old")]


def a_file(top: Path) -> Row:
    (top / "out").touch()
    return top / "out", []


def a_fifo(top: Path) -> Row:
    os.mkfifo(top / "out")
    return top / "out", []


def the_root(_top: Path) -> Row:
    return Path("/"), []


def a_mount(_top: Path) -> Row:
    return Path("/proc"), []


def the_home(top: Path) -> Row:
    return lay(top / "home", "old"), []


def the_current_folder(top: Path) -> Row:
    return lay(top / "here", "old"), []


def the_current_folder_as_a_dot(top: Path) -> Row:
    lay(top / "here", "old")
    return Path(), []


def an_empty_folder(top: Path) -> Row:
    (top / "out").mkdir()
    return top / "out", []


def no_manifest(top: Path) -> Row:
    lay(top / "out", "old")
    (top / "out" / "config.json").unlink()
    (top / "out" / "mopt.json").unlink()
    return top / "out", []


def no_tensors(top: Path) -> Row:
    lay(top / "out", "old")
    (top / "out" / "diffusion_pytorch_model.safetensors").unlink()
    return top / "out", []


def with_notes(top: Path) -> Row:
    (lay(top / "out", "old") / "notes.txt").write_text("mine")
    return top / "out", []


def with_git(top: Path) -> Row:
    (lay(top / "out", "old") / ".git").mkdir()
    return top / "out", []


def with_a_link_to_tensors(top: Path) -> Row:
    (lay(top / "out", "old") / "more.safetensors").symlink_to("diffusion_pytorch_model.safetensors")
    return top / "out", []


def with_a_folder_named_as_tensors(top: Path) -> Row:
    (lay(top / "out", "old") / "more.safetensors").mkdir()
    return top / "out", []


def with_a_linked_component(top: Path) -> Row:
    lay(top / "elsewhere", "old")
    (lay(top / "out", "old") / "transformer").symlink_to(top / "elsewhere")
    return top / "out", []


def with_notes_in_a_component(top: Path) -> Row:
    (lay(lay(top / "out", "old") / "transformer", "old") / "notes.txt").touch()
    return top / "out", []


def with_a_folder_in_a_component(top: Path) -> Row:
    (lay(lay(top / "out", "old") / "transformer", "old") / "transformer").mkdir()
    return top / "out", []


def with_a_fifo(top: Path) -> Row:
    os.mkfifo(lay(top / "out", "old") / "pipe.json")
    return top / "out", []


EVEN_WITH_OVERWRITE: list[tuple[str, Callable[[Path], Row]]] = [
    *(("symlink", make) for make in (a_symlink, a_dangling_symlink)),
    *(("no_parent", make) for make in (a_missing_parent, a_file_as_parent)),
    *(("is_input", make) for make in (the_input, the_input_by_a_link, the_input_by_a_linked_parent)),
    *(("inside_input", make) for make in (inside_the_input, inside_the_second_input, deep_inside_the_input)),
    ("around_input", around_the_input),
    *(("not_a_directory", make) for make in (a_file, a_fifo)),
    *(("mount_point", make) for make in (the_root, a_mount)),
    *(("special_folder", make) for make in (the_home, the_current_folder, the_current_folder_as_a_dot)),
    *(("not_a_checkpoint", make) for make in (an_empty_folder, no_manifest, no_tensors)),
    ("not_a_checkpoint", with_git),
]
NOT_WITHOUT_CONSENT: list[Callable[[Path], Row]] = [
    *(with_notes, with_a_link_to_tensors, with_a_fifo),
    *(with_a_folder_named_as_tensors, with_a_linked_component),
    *(with_notes_in_a_component, with_a_folder_in_a_component),
]
ONLY_WITHOUT: list[tuple[str, Callable[[Path], Row]]] = [
    ("exists", an_empty_folder),
    ("exists", lambda top: (lay(top / "out", "old"), [])),
]


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose ``home`` and ``here`` are the home and the current folder once they exist."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def refuse(
    top: Path,
    make: Callable[[Path], Row],
    monkeypatch: pytest.MonkeyPatch,
    *,
    overwrite: bool,
    overwrite_foreign: bool = False,
) -> str:
    output, inputs = make(top)
    if (top / "here").is_dir():
        monkeypatch.chdir(top / "here")
    before = snapshot(top)
    with pytest.raises(OutputRefusedError) as refused:
        check_output_allowed(output, inputs, overwrite=overwrite, overwrite_foreign=overwrite_foreign)
    assert snapshot(top) == before
    error = refused.value
    assert error.exit_code == ExitCode.OUTPUT
    assert error.path == str(canonical_output(output)) and error.path in error.message
    assert error.hint
    return error.code


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("kind", "make"), EVEN_WITH_OVERWRITE, ids=lambda one: getattr(one, "__name__", one))
def test_refused_even_with_overwrite(
    top: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make: Callable[[Path], Row], foreign: bool
) -> None:
    assert refuse(top, make, monkeypatch, overwrite=True, overwrite_foreign=foreign) == f"output.{kind}"


@pytest.mark.parametrize("make", NOT_WITHOUT_CONSENT)
def test_refused_without_consent_to_lose_it(
    top: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Row]
) -> None:
    assert refuse(top, make, monkeypatch, overwrite=True) == "output.foreign"
    standing = check_output_allowed(top / "out", [], overwrite=False, overwrite_foreign=True)
    assert standing is not None and len(standing.foreign) == 1


@pytest.mark.parametrize(("kind", "make"), ONLY_WITHOUT)
def test_refused_without_overwrite(
    top: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make: Callable[[Path], Row]
) -> None:
    assert refuse(top, make, monkeypatch, overwrite=False) == f"output.{kind}"


def test_the_message_names_the_strangers(top: Path) -> None:
    output, _ = with_notes_in_a_component(top)
    (output / "alone.safetensors").touch()
    with pytest.raises(OutputRefusedError, match=r"alone\.safetensors, transformer/"):
        check_output_allowed(output, [], overwrite=True)


def test_a_checkpoint_that_its_record_lists_may_be_replaced(top: Path) -> None:
    output = lay(top / "out", "old")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (output / name).touch()
    for component in ("transformer", "transformer_2"):
        lay(output / component, "old")
    standing = check_output_allowed(with_record(output), [lay(top / "export", "old")], overwrite=True)
    assert standing is not None and standing.foreign == () and "transformer/config.json" in standing.tree


def test_an_absent_output_needs_no_consent(top: Path) -> None:
    check_output_allowed(top / "out", [lay(top / "export", "old")], overwrite=False)


def test_a_pipeline_folder_is_a_checkpoint_by_its_model_index(top: Path) -> None:
    (top / "out").mkdir()
    (top / "out" / "model_index.json").touch()
    lay(top / "out" / "transformer", "old")
    standing = check_output_allowed(top / "out", [], overwrite=False, overwrite_foreign=True)
    assert standing is not None and standing.foreign == ("model_index.json", "transformer/")


@pytest.mark.parametrize("name", ["x" * 234, "é" * 117])
def test_the_longest_name_whose_stage_has_a_name(top: Path, name: str) -> None:
    """The stage beside OUT has a longer name than OUT: found before hours of work, and not as a bug of mopt."""
    publish(top / name)
    assert held_by(top / name) == files_of("new")
    for longer in (f"{name}x", "x" * 256):
        with pytest.raises(OutputRefusedError) as refused:
            check_output_allowed(top / longer, [], overwrite=False)
        assert refused.value.code == "output.name_too_long" and refused.value.hint


def test_a_removed_current_folder_forbids_nothing(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "here").mkdir()
    monkeypatch.chdir(top / "here")
    (top / "here").rmdir()
    check_output_allowed(lay(top / "out", "old"), [], overwrite=True)


def test_a_file_that_vanishes_while_it_is_looked_at_is_no_stranger(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may be removing the tree."""
    output = lay(top / "out", "old")
    original = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path.name == "config.json":
            path.unlink()
        return original(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert sorted(look(output)) == ["diffusion_pytorch_model.safetensors", "mopt.json"]
    assert not (output / "config.json").exists()


def test_a_user_without_a_home_is_refused_nothing(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run for an arbitrary user."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    check_output_allowed(lay(top / "out", "old"), [], overwrite=True)


@pytest.mark.parametrize(
    "address", ["C:\\out\\flux", "C:/out", "file:///data/out", "https://example.org/out", "s3://a/b"]
)
def test_an_address_is_no_path(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputRefusedError) as caught:
        canonical_output(Path(address))
    assert caught.value.code == "output.address" and address in caught.value.message
    assert "/data/out" in caught.value.hint or not address.startswith("file:")
    assert canonical_output(tmp_path / address.replace("/", "-")).parent == tmp_path
