"""A hostile ``.pt``: cut, changed while it is read, or asking for memory; that in a process of its own."""

import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import Bomb, as_it_is, rezipped
from figures import note
from fp8_support import small_old_pair, two_weights
from limited import run_limited

from modelopt_convert.checkpoint import torch_archive
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.torch_archive import private_copy
from modelopt_convert.dialects.modelopt.amax_file import read_amax
from modelopt_convert.run.errors import InputError

AMAX = {"lin": torch.tensor(3.0), "other": torch.tensor(5.0)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An old export and its ``.pt``."""
    return small_old_pair(tmp_path, two_weights(), AMAX)


def code_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_amax(path, str)
    assert caught.value.hint and len(caught.value.message) < 1000
    return caught.value.code


def amax_of(path: Path) -> dict[str, float]:
    found, _ = read_amax(path, str)
    return {module: roles["weight_scale"].value for module, roles in found.items()}


def with_pickle(good: Path, path: Path, content: bytes) -> Path:
    """The archive with another pickle in it."""

    def change(write: zipfile.ZipFile, name: str, found: bytes) -> None:
        write.writestr(name, content if name.endswith("/data.pkl") else found)

    return rezipped(good, path, change)


def with_member(good: Path, path: Path, leaf: str, content: bytes) -> Path:
    """The archive with another member of this name."""

    def change(write: zipfile.ZipFile, name: str, found: bytes) -> None:
        write.writestr(name, content if name.endswith(f"/{leaf}") else found)

    return rezipped(good, path, change)


def integer(value: int) -> bytes:
    raw = value.to_bytes(8, "little")
    return b"\x8a\x08" + raw


def one_bytearray() -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\n" + integer(1 << 36) + b"\x85R."


def many_sets() -> bytes:
    """One list of 100,000 numbers, and 20,000 sets of it: 80 GB from 350 kB."""
    numbers = b"".join(b"J" + number.to_bytes(4, "little") for number in range(100_000))
    return b"\x80\x02](" + numbers + b"eq\x00cbuiltins\nset\nq\x01](" + b"h\x01h\x00\x85R" * 20_000 + b"e."


def one_tensor() -> bytes:
    return b"\x80\x02ctorch\nFloatTensor\n" + integer(1 << 36) + b"\x85R."


def nested() -> bytes:
    return b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."


BOMBS = [one_bytearray, many_sets, one_tensor, nested]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_pickle_that_asks_for_memory_is_refused(
    bomb: Callable[[], bytes], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """All of these are on torch's list of what is safe; the limit of the process itself would be twice as high."""
    export, good = pair
    path = with_pickle(good, tmp_path / "bomb.pt", bomb())
    arguments = ("convert-fp8", "--preset", "none", "--export", export, "--output", tmp_path / "out")
    ended = run_limited(*arguments, "--checkpoint", path, space=16 << 30)
    print(bomb.__name__, ended.error_code, ended.figures)
    note(6, bomb=bomb.__name__, canaries=0, **ended.figures)
    assert (ended.exit_code, ended.error_code) in {(3, "pickle.refused"), (3, "pickle.content")}, ended.stderr
    assert 0 < ended.peak_mb < 2500
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["the whole", "a value"])
def test_no_canary_dies_in_a_process_of_its_own(place: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    export, _ = pair
    fired, path = tmp_path / "fired", tmp_path / "bomb.pt"
    torch.save(Bomb(fired) if place == "the whole" else {"model_state_dict": {"x": Bomb(fired)}}, path)
    arguments = ("convert-fp8", "--preset", "none", "--export", export, "--output", tmp_path / "out")
    ended = run_limited(*arguments, "--checkpoint", path)
    assert (ended.exit_code, ended.error_code) == (3, "pickle.refused"), ended.stderr
    note(6, canary=place, canaries=int(fired.exists()), **ended.figures)
    assert not fired.exists()
    torch.load(path, weights_only=False)
    assert fired.exists()  # the bomb is a real one


def test_cut_anywhere_in_its_directory_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = pair[1].read_bytes()
    directory = whole.index(b"PK\x01\x02")
    path = tmp_path / "cut.pt"
    for size in range(directory, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as caught, private_copy(path):
            pass
        assert caught.value.code.startswith("pickle.")
    note(7, file=".pt", lengths=len(whole) - directory, accepted=0)


def test_cut_before_its_directory_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = pair[1].read_bytes()
    path = tmp_path / "cut.pt"
    for size in range(0, whole.index(b"PK\x01\x02"), 97):
        path.write_bytes(whole[:size])
        assert code_of(path) == "pickle.not_zip"


def test_what_happens_to_the_file_after_the_check_does_not_matter(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped by torch itself, the truncated file would kill the process or read as zeros."""
    real = torch.load

    def cut_and_load(*arguments: Any, **options: Any) -> Any:
        os.truncate(pair[1], 10)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", cut_and_load)
    assert amax_of(pair[1]) == {"lin": 3.0, "other": 5.0}


@pytest.mark.parametrize("change", ["cut", "touched"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    change: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LocalFile.read, iter(range(1000))

    def read(file: LocalFile, offset: int, num_bytes: int) -> bytes:
        if next(calls) == 8:
            if change == "cut":
                os.truncate(pair[1], 10)
            else:
                os.utime(pair[1], ns=(0, 0))
        return real(file, offset, num_bytes)

    monkeypatch.setattr(LocalFile, "read", read)
    assert code_of(pair[1]) == "input.changed"
    assert next(calls) > 8


def test_an_amax_within_another_tensor_is_read_or_refused(tmp_path: Path) -> None:
    """Only the beginning of each tensor is copied: a value further back must not be taken for zero."""
    for index, code in ((0, None), (1023, None), (1024, "pickle.content"), (4095, "pickle.content")):
        table = torch.arange(1.0, 4097.0)
        amax = {"lin": table[index], "other": torch.tensor(1.0)}
        state = {f"{name}.weight_quantizer._amax": value for name, value in amax.items()}
        path = tmp_path / "transformer.pt"
        torch.save({"model_state_dict": state}, path)
        if code is None:
            assert amax_of(path)["lin"] == index + 1
        else:
            assert code_of(path) == code


# (what, how the archive is changed, the code)
REFUSED: list[tuple[str, Callable[[Path, Path], Path], str]] = [
    ("big-endian", lambda good, path: with_member(good, path, "byteorder", b"big"), "pickle.content"),
    ("a pickle beyond the limit", lambda good, path: with_pickle(good, path, bytes(5000)), "pickle.too_large"),
    ("an empty pickle", lambda good, path: with_pickle(good, path, b""), "pickle.refused"),
    ("a pickle of noise", lambda good, path: with_pickle(good, path, bytes(range(256))), "pickle.refused"),
    ("a pickle of a number", lambda good, path: with_pickle(good, path, pickle.dumps(1, 2)), "pickle.content"),
]


@pytest.mark.parametrize(("change", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(
    change: Callable[[Path, Path], Path],
    code: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_archive, "_MAX_PICKLE_BYTES", 4096)
    assert code_of(change(pair[1], tmp_path / "changed.pt")) == code


def test_a_directory_beyond_the_limit_is_not_read(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_archive, "_MAX_DIRECTORY_BYTES", 66_000)  # zipfile looks for its end in so many
    plain = rezipped(pair[1], tmp_path / "plain.pt", as_it_is)
    assert amax_of(plain) == {"lin": 3.0, "other": 5.0}
    with zipfile.ZipFile(plain, "a") as archive:
        for number in range(1000):
            archive.writestr(f"transformer/data/more{number}", b"")
    assert code_of(plain) == "pickle.not_zip"


def test_a_link_to_the_file_is_followed_and_a_pipe_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The user named it; it may lie anywhere."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "transformer.pt"
    link.symlink_to(pair[1])
    assert amax_of(link) == {"lin": 3.0, "other": 5.0}
    link.unlink()
    os.mkfifo(link)
    assert code_of(link) == "input.not_regular"
    link.unlink()
    link.symlink_to(link)
    assert code_of(link) == "input.unreadable"


def test_the_limit_of_memory_is_lifted_afterwards(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    amax_of(pair[1])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert code_of(with_pickle(pair[1], tmp_path / "bomb.pt", one_bytearray())) == "pickle.refused"
    assert resource.getrlimit(resource.RLIMIT_AS) == before
