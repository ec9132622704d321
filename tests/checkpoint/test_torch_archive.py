"""The .pt of an older export: what is not a plain archive of torch is refused, and nothing in it is ever run."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from archives import Bomb, as_it_is, rezipped
from faults import entries
from fp8_support import PACKED, checkpoint_of, convert, fp8_refused
from support import load, same_bits

WEIGHT_AMAX = f"{PACKED}.weight_quantizer._amax"


@pytest.mark.parametrize("place", ["top", "state dict", "instead of a tensor"])
def test_a_reduce_is_refused_and_never_runs(place: str, old: Path, base: Path, room: Path, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    bomb = Bomb(fired)
    found = {
        "top": {"model_state_dict": {}, "modelopt_state": bomb},
        "state dict": {"modelopt_state": {}, "model_state_dict": {"x": bomb}},
        "instead of a tensor": {"modelopt_state": {}, "model_state_dict": {WEIGHT_AMAX: bomb}},
    }[place]
    path = tmp_path / "transformer.pt"
    torch.save(found, path)
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.refused", names=(str(path),))
    assert not fired.exists()
    torch.load(path, weights_only=False)
    assert fired.exists()  # the bomb is a real one


def legacy(path: Path, good: Path) -> None:
    torch.save(torch.load(good, weights_only=True), path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.with_name("fired"))))


def tar(path: Path, good: Path) -> None:
    """torch before 0.1.10 wrote these; its loader still unpickles them."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Bomb(path.with_name("fired")))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def empty(path: Path, good: Path) -> None:
    path.write_bytes(b"")


def safetensors(path: Path, good: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)


@pytest.mark.parametrize("make", [legacy, bare_pickle, tar, empty, safetensors])
def test_what_is_no_zip_is_refused(
    make: Callable[[Path, Path], None], old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    path = tmp_path / "transformer.pt"
    make(path, good)
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.not_zip", names=(str(path),))
    assert not (tmp_path / "fired").exists()


def test_a_zip_behind_a_pickle_is_refused(old: Path, good: Path, base: Path, room: Path, tmp_path: Path) -> None:
    """To whoever looks for a zip's end it is one; to whoever looks at its beginning, a pickle of the old kind."""
    fired, path = tmp_path / "fired", tmp_path / "transformer.pt"
    path.write_bytes(pickle.dumps(Bomb(fired)) + good.read_bytes())
    assert zipfile.is_zipfile(path)
    before = entries(room)
    outcome = convert(old, base, room / "out", "--checkpoint", path)
    assert outcome.exit_code == 3 and outcome.error_code in {"pickle.member", "pickle.not_zip", "pickle.refused"}, (
        outcome.stderr
    )
    assert not fired.exists() and entries(room) == before
    with pytest.raises(RuntimeError, match="magic number"):
        torch.load(path, weights_only=False)
    assert fired.exists()


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_checkpoint_is_refused(
    kept: float, old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    content = good.read_bytes()
    path = tmp_path / "transformer.pt"
    path.write_bytes(content[: int(len(content) * kept)])
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.not_zip", names=(str(path),))


def compressed(write: zipfile.ZipFile, name: str, content: bytes) -> None:
    """One tensor's bytes, deflated: a few kilobytes could stand for gigabytes."""
    method = zipfile.ZIP_DEFLATED if name.endswith("data/3") else zipfile.ZIP_STORED
    write.writestr(name, content, method)


def twice(write: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Which of the two is read depends on who reads."""
    write.writestr(name, content)
    if name.endswith("data.pkl"):
        write.writestr(name, pickle.dumps(Bomb(Path("/nonexistent/fired"))))


def renamed(new: str) -> Callable[[zipfile.ZipFile, str, bytes], None]:
    def change(write: zipfile.ZipFile, name: str, content: bytes) -> None:
        write.writestr(new if name.endswith("data/3") else name, content)

    return change


def two_roots(write: zipfile.ZipFile, name: str, content: bytes) -> None:
    write.writestr(name, content)
    if name.endswith("data.pkl"):
        write.writestr("other/data.pkl", content)


def without_pickle(write: zipfile.ZipFile, name: str, content: bytes) -> None:
    if not name.endswith("data.pkl"):
        write.writestr(name, content)


REZIPPED: list[tuple[Callable[[zipfile.ZipFile, str, bytes], None], str]] = [
    (compressed, "pickle.compressed"),
    (twice, "pickle.member"),
    (renamed("../../escaped"), "pickle.member"),
    (renamed("transformer/../data/3"), "pickle.member"),
    (renamed("/transformer/data/3"), "pickle.member"),
    (renamed("transformer\\data\\3"), "pickle.member"),
    (two_roots, "pickle.refused"),
    (without_pickle, "pickle.refused"),
]


@pytest.mark.parametrize(("change", "code"), REZIPPED)
def test_zips_that_torch_would_not_write_are_refused(
    change: Callable[[zipfile.ZipFile, str, bytes], None],
    code: str,
    old: Path,
    good: Path,
    base: Path,
    room: Path,
    tmp_path: Path,
) -> None:
    path = rezipped(good, tmp_path / "transformer.pt", change)
    fp8_refused(old, base, room, "--checkpoint", path, code=code, names=(str(path),))


def patched(source: Path, target: Path, member: str, field: int, value: int) -> Path:
    """A copy with one 32-bit field of a member's central directory entry changed: 20, 24 sizes, 42 offset."""
    content = bytearray(source.read_bytes())
    place = content.index(member.encode(), content.index(b"PK\x01\x02")) - 46
    assert content[place : place + 4] == b"PK\x01\x02"
    content[place + field : place + field + 4] = value.to_bytes(4, "little")
    target.write_bytes(content)
    return target


PATCHED: list[tuple[str, dict[int, int], str]] = [
    ("data/5", {42: 0}, "pickle.member"),  # lies where the first member lies
    ("data/5", {20: 1 << 30, 24: 1 << 30}, "pickle.size"),  # larger than the file
    (".data/serialization_id", {20: 4096, 24: 4096}, "pickle.size"),  # the last, longer than what is left
    ("data/5", {24: 1}, "pickle.size"),  # not as large as it is stored
    ("data/5", {24: 1 << 30}, "pickle.size"),  # grows when unpacked
]


@pytest.mark.parametrize(("member", "fields", "code"), PATCHED)
def test_members_that_overlap_or_overflow_are_refused(
    member: str, fields: dict[int, int], code: str, old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    """As in a zip bomb of overlapping members: each is within the file, their sum is not."""
    path = tmp_path / "transformer.pt"
    plain = rezipped(good, tmp_path / "plain.pt", as_it_is)  # torch aligns members by extra fields
    source = plain
    for field, value in fields.items():
        source = patched(source, path, f"transformer/{member}", field, value)
    fp8_refused(old, base, room, "--checkpoint", path, code=code, names=(str(path),))
    # The same zip without the patch is read.
    assert convert(old, base, room / "out", "--checkpoint", plain).exit_code == 0


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ({"modelopt_state": {}}, "model_state_dict"),
        ({"modelopt_state": {}, "model_state_dict": {}}, "amax"),
        ({"modelopt_state": {}, "model_state_dict": {"x.weight": torch.ones(2, 2)}}, "amax"),
        ({"modelopt_state": {}, "model_state_dict": [1, 2]}, "model_state_dict"),
        ([torch.ones(2)], "model_state_dict"),
        (torch.ones(2), "model_state_dict"),
    ],
)
def test_a_checkpoint_without_amax_is_refused(
    found: object, missing: str, old: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    path = tmp_path / "transformer.pt"
    torch.save(found, path)
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.content", names=(str(path), missing))


def test_a_folder_that_holds_one_checkpoint_is_fine(fp8: Path, old: Path, base: Path, tmp_path: Path) -> None:
    """Whatever its name: backbone.pt once, transformer.pt today. Other builders know the first alone."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "notes.txt").write_text("not a checkpoint")
    for name in ("backbone.pt", "transformer.pt"):
        path = folder / name
        path.write_bytes(checkpoint_of(fp8).read_bytes())
        outcome = convert(old, base, tmp_path / name, "--checkpoint", folder)
        assert outcome.exit_code == 0, outcome.stderr
        path.unlink()
    assert same_bits(*(load(tmp_path / name)[f"{PACKED}.weight"] for name in ("backbone.pt", "transformer.pt")))


def test_of_two_checkpoints_the_one_named_like_the_component_is_taken(
    old: Path, good: Path, base: Path, tmp_path: Path
) -> None:
    """As ModelOpt's example names them for Wan2.2."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "transformer.pt").write_bytes(good.read_bytes())
    (folder / "transformer_2.pt").write_bytes(b"of another component")
    outcome = convert(old, base, tmp_path / "out", "--checkpoint", folder)
    assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize("names", [(), ("backbone.pt", "model.pt")])
def test_a_folder_with_none_or_several_is_refused(
    names: tuple[str, ...], old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(good.read_bytes())
    fp8_refused(old, base, room, "--checkpoint", folder, code="pickle.missing", names=(str(folder), *names))


def test_a_missing_file_is_refused(old: Path, base: Path, room: Path, tmp_path: Path) -> None:
    path = tmp_path / "absent.pt"
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.missing", names=(str(path),))
