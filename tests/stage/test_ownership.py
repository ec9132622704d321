"""What is known to be the checkpoint, and what is somebody's own: by record and bytes, and not by name. No torch."""

import errno
import io
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import COPIES, FOLDERS, SHARD, SPECS, files_of, fill, held_by, lay
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_support import before, left_trees, litter, publish, with_record

from modelopt_convert.checkpoint.companions import folders_of
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.run.errors import ExitCode, OutputRefusedError, StorageError
from modelopt_convert.stage import ownership
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.output_rules import check_output_allowed
from modelopt_convert.stage.ownership import changed, in_words, standing_at

OLD, NEW = files_of("old"), files_of("new")


def foreign(folder: Path) -> tuple[str, ...]:
    return standing_at(folder).foreign


def plant_file(path: Path) -> None:
    path.write_bytes(b"mine")


def plant_nothing(path: Path) -> None:
    path.touch()


def plant_link(path: Path) -> None:
    path.symlink_to(SHARD)


def plant_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def plant_hard_link(path: Path) -> None:
    path.hardlink_to(path.parent / "config.json")


def plant_copy(path: Path) -> None:
    shutil.copy(next(path.parent.glob("*.safetensors")), path)


def plant_folder(path: Path) -> None:
    path.mkdir()


def plant_full_folder(path: Path) -> None:
    lay(path, "another")


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may be 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


PLANTS = [
    *(plant_file, plant_nothing, plant_link, plant_dangling_link, plant_hard_link, plant_copy),
    *(plant_folder, plant_full_folder, plant_fifo, plant_socket),
]
NAMES = [
    *(
        "my_lora.safetensors",
        "train_log.json",
        "notes.md",
        "README.md",
        "LICENSE",
        ".gitattributes",
        "model_index.json",
    ),
    *("more.safetensors.index.json", "transformer", "vae", "x", ".x", "a b\n", "é", "caf\udce9", "mopt.json.bak"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plant", PLANTS)
def test_what_the_record_does_not_list_is_foreign(tmp_path: Path, plant: Callable[[Path], None], name: str) -> None:
    folder = lay(tmp_path / "out", "old")
    assert foreign(folder) == ()
    plant(folder / name)
    held = held_by_names(folder)
    is_folder = (folder / name).is_dir() and not (folder / name).is_symlink()
    # A second file with the weights of the record: neither is known to be the one.
    twins = {SHARD} if plant is plant_copy and name.endswith(".safetensors") else set()
    assert set(foreign(folder)) == {f"{name}/" if is_folder else name} | twins
    with pytest.raises(OutputRefusedError) as refused:
        publish(folder)
    assert (refused.value.code, refused.value.exit_code) == ("output.foreign", ExitCode.OUTPUT)
    assert in_words([name]) in refused.value.message and "--overwrite-foreign" in str(refused.value.hint)
    assert held_by_names(folder) == held and litter(folder) == []
    with StagingDir(folder, (), overwrite=False, overwrite_foreign=True, need_bytes=1) as stage:
        fill(stage, "new")
        published = stage.publish()
    assert (set(published.foreign), published.warnings) == (set(foreign_names(name, is_folder)) | twins, ())
    assert (held_by(folder), litter(folder)) == (NEW, [])


def foreign_names(name: str, is_folder: bool) -> list[str]:
    return [f"{name}/" if is_folder else name]


def held_by_names(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mode, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=40)
        .filter(lambda name: name not in {".", "..", *OLD})
        .flatmap(lambda name: st.sampled_from([name, f"{name}.safetensors", f"{name}.json", f"{name}.md"])),
        st.binary(max_size=20),
        max_size=4,
    ),
    st.sets(st.sampled_from(sorted(OLD))),
)
def test_whatever_is_not_as_recorded_is_foreign(
    tmp_path_factory: pytest.TempPathFactory, added: dict[str, bytes], edited: set[str]
) -> None:
    folder = lay(tmp_path_factory.mktemp("top") / "out", "old")
    for name, data in added.items():
        (folder / name).write_bytes(data)
    for name in edited:
        with (folder / name).open("ab") as file:
            file.write(b" ")
    # Without its record nothing of a checkpoint is known.
    expected = {*added, *(OLD if "mopt.json" in edited else edited)}
    assert set(foreign(folder)) == expected


def flip(path: Path) -> None:
    """One bit of the weights, in place: names, sizes and headers are as they were."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def flip_and_hide(path: Path) -> None:
    """And the time is put back, as ``cp -p`` and ``rsync -t`` do."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def put_another_in_place(path: Path) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def flip_and_copy(path: Path) -> None:
    """Each file of the copy is younger than the edit, the record youngest."""
    flip(path)
    edited = path.parent.rename(path.parent.with_name("edited"))
    shutil.copytree(edited, path.parent, copy_function=shutil.copy)
    later = path.stat().st_ctime_ns + 10**9
    os.utime(path.with_name("mopt.json"), ns=(later, later))


@pytest.mark.parametrize("edit", [flip, flip_and_hide, put_another_in_place, flip_and_copy])
def test_weights_that_were_edited_are_foreign(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    folder = lay(tmp_path / "out", "old")
    edit(folder / SHARD)
    assert foreign(folder) == (SHARD,)


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is looked at twice, and read again only where it may have changed."""
    read: list[int] = []

    class CountedFile(LocalFile):
        def read(self, offset: int, num_bytes: int) -> bytes:
            read.append(num_bytes)
            return super().read(offset, num_bytes)

    monkeypatch.setattr(ownership, "LocalFile", CountedFile)
    folder = lay(tmp_path / "out", "old")
    weights = sum(spec.num_bytes for spec in SPECS)
    assert foreign(folder) == () and sum(read) > weights
    read.clear()
    assert foreign(folder) == () and sum(read) < weights
    flip_and_hide(folder / SHARD)
    assert foreign(folder) == (SHARD,)


def test_a_pipeline_is_known_part_by_part(tmp_path: Path) -> None:
    folder = lay(tmp_path / "out", "old", FOLDERS)
    assert foreign(folder) == ()
    (folder / "transformer" / "notes.md").touch()
    (folder / "transformer_2" / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "vae" / "model.safetensors").write_bytes(b"edited")
    assert foreign(folder) == ("scheduler/", "transformer/notes.md", "transformer_2/config.json", "vae/")
    record = folder / "transformer" / "mopt.json"
    record.write_bytes(files_of("another")["mopt.json"])  # a record, and not the one that the pipeline's lists
    assert foreign(folder) == ("scheduler/", "transformer/", "transformer_2/config.json", "vae/")


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for number in (1, 2):
        lay(tmp_path / f"part{number}", f"part{number}")
    rename = {"part1": ("a", "b"), "part2": ("c", "d")}
    weight_map = {}
    for part, names in rename.items():
        data = (tmp_path / part / SHARD).read_bytes()
        for old, new in zip(("a", "b"), names, strict=True):
            data = data.replace(f'"{old}.weight"'.encode(), f'"{new}.weight"'.encode())
            weight_map[f"{new}.weight"] = f"{part}.safetensors"
        (folder / f"{part}.safetensors").write_bytes(data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    with_record(folder)
    assert foreign(folder) == ()
    shutil.copy(folder / "part1.safetensors", folder / "part3.safetensors")
    assert foreign(folder) == ("part3.safetensors",)
    (folder / "part2.safetensors").unlink()  # what is left is no whole checkpoint, so nothing says that it is this one
    assert foreign(folder) == ("part1.safetensors", "part3.safetensors")


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record | {"notes": "mine"},
        lambda record: record | {"digests": {}},
        lambda record: record["digests"]["files"].update({"../../x": "0" * 32, "": "0" * 32}) or record,
    ],
)
def test_an_edited_record_says_nothing(tmp_path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    folder = lay(tmp_path / "out", "old")
    record = json.loads((folder / "mopt.json").read_bytes())
    (folder / "mopt.json").write_text(json.dumps(edit(record)))
    assert foreign(folder) == tuple(sorted(OLD))


@pytest.mark.parametrize("name", ["config.json", "mopt.json"])
def test_a_link_in_the_place_of_a_file_is_foreign(tmp_path: Path, name: str) -> None:
    """Also to the same bytes."""
    folder = lay(tmp_path / "out", "old")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert name in foreign(folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [SHARD, "config.json", "mopt.json"])
def test_what_cannot_be_read_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Else the hint would be to let it go."""
    folder = lay(tmp_path / "out", "old")
    opened, io_opened = os.open, io.open

    def fail(path: object) -> None:
        if isinstance(path, str | Path) and Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", lambda path, *more, **how: (fail(path), opened(path, *more, **how))[1])
    monkeypatch.setattr(io, "open", lambda path, *more, **how: (fail(path), io_opened(path, *more, **how))[1])
    for consent in (False, True):
        with pytest.raises(StorageError if number == errno.EIO else OutputRefusedError, match=name) as refused:
            check_output_allowed(folder, [], overwrite=True, overwrite_foreign=consent)
        assert refused.value.code == ("storage.failed" if number == errno.EIO else "output.unreadable")


def test_a_record_of_another_tool_says_nothing(tmp_path: Path) -> None:
    folder = lay(tmp_path / "out", "old")
    record = json.loads((folder / "mopt.json").read_bytes())
    (folder / "mopt.json").write_bytes(json_bytes(record | {"schema": "other/1"}))
    assert foreign(folder) == tuple(sorted(OLD))


def add(out: Path) -> None:
    (out / "added.safetensors").touch()


def edit_card(out: Path) -> None:
    (out / "config.json").write_bytes(OLD["config.json"][:-1] + b" ")


def touch(out: Path) -> None:
    os.utime(out / SHARD)


def remove(out: Path) -> None:
    (out / "config.json").unlink()


def turn_into_a_link(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("mopt.json")


def edit_and_hide(out: Path) -> None:
    """Size and time are as they were."""
    path = out / "config.json"
    status = path.stat()
    path.write_text(path.read_text().replace("old", "odd"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("consent", ["overwrite", "overwrite_foreign"])
@pytest.mark.parametrize("change", [add, edit_card, touch, remove, turn_into_a_link, edit_and_hide])
def test_what_changed_since_the_check_stops_the_swap(out: Path, change: Callable[[Path], None], consent: str) -> None:
    lay(out, "old")
    wanted = {"overwrite": consent == "overwrite", "overwrite_foreign": consent != "overwrite"}
    with pytest.raises(StorageError) as failed, StagingDir(out, (), **wanted, need_bytes=1) as stage:
        fill(stage, "new")
        change(out)
        now = held_by_names(out)
        stage.publish()
    assert failed.value.code == "storage.swap_refused" and failed.value.kept_at is not None
    assert held_by_names(out) == now
    assert held_by(Path(failed.value.kept_at)) == NEW and left_trees(out) == [Path(failed.value.kept_at).name]


@pytest.mark.parametrize("change", [add, edit_card])
def test_what_changed_in_the_last_instant_is_kept(
    out: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(out, "old")
    before(monkeypatch, "exchange", lambda *_: change(out))
    published = publish(out)
    [kept] = litter(out)
    assert held_by(out) == NEW and kept in published.warnings[0]
    assert held_by(out.parent / kept) != OLD


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_modes_are_kept(out: Path, umask: int) -> None:
    lay(out, "old", FOLDERS)
    for path in out.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    out.chmod(0o700)
    (out / "mopt.json").chmod(0o664)
    asked = os.umask(umask)
    try:
        with StagingDir(out, (), overwrite=True, need_bytes=1, copies=COPIES) as stage:
            fill(stage, "new", FOLDERS)
            stage.write_file("README.md", b"new here")
            stage.publish()
    finally:
        os.umask(asked)
    modes = {str(path.relative_to(out)): mode_of(path) for path in out.rglob("*")}
    assert mode_of(out) == 0o700 and modes.pop("mopt.json") == 0o664
    assert {modes.pop(folder) for folder in (*FOLDERS, *folders_of(COPIES))} == {0o700}
    assert set(modes.values()) == {0o600}


def test_names_in_words() -> None:
    assert in_words(["a", "caf\udce9"]) == "a, caf\\udce9"
    assert in_words(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_two_looks_at_one_folder_differ_by_nothing(tmp_path: Path) -> None:
    folder = lay(tmp_path / "out", "old", FOLDERS)
    seen = standing_at(folder)
    assert changed(seen, standing_at(folder)) == [] and len(seen.tree) == 9 + len([*COPIES, *folders_of(COPIES)])
    (folder / "transformer" / "config.json").unlink()
    assert changed(seen, standing_at(folder)) == ["transformer/config.json"]
