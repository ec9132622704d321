"""Bytes that an input has already, on file systems whose files can share blocks: the kernel copies whole blocks."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.stage import shard_writer
from modelopt_convert.stage.locks import file_system_of
from modelopt_convert.stage.shard_writer import ShardWriter

BLOCK = 4096
DATA = os.urandom(5 * BLOCK + 100)


@pytest.fixture
def sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the tests counts as one where files share blocks."""
    monkeypatch.setattr(shard_writer, "SHARING_FILE_SYSTEMS", frozenset({file_system_of(tmp_path)}))


def write(folder: Path, shift: int, size: int = len(DATA)) -> Path:
    """A shard of one tensor whose bytes lie in another file, ``shift`` bytes off in their block."""
    path = folder / "x.safetensors"
    path.unlink(missing_ok=True)
    with ShardWriter(path, [TensorSpec("a", "U8", (size,))]) as writer:
        [begin] = writer._offsets.values()
        at = BLOCK + (begin + shift) % BLOCK
        (folder / "source").write_bytes(bytes(at) + DATA[:size])
        source = os.open(folder / "source", os.O_RDONLY)
        try:
            writer.write("a", (DATA[k : min(k + 1000, size)] for k in range(0, size, 1000)), (source, at))
        finally:
            os.close(source)
    assert writer.digests["a"] == xxhash.xxh3_128_hexdigest(DATA[:size])
    assert path.read_bytes()[begin:] == DATA[:size]
    return path


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel copied, and every byte that was written besides."""
    counts = [0, 0]
    copy, pwrite = os.copy_file_range, os.pwrite

    def counting(*arguments: int) -> int:
        counts[0] += (count := copy(*arguments))
        return count

    def writing(fd: int, data: bytes, offset: int) -> int:
        counts[1] += len(data)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "copy_file_range", counting)
    monkeypatch.setattr(os, "pwrite", writing)
    return counts


@pytest.mark.usefixtures("sharing")
def test_whole_blocks_are_copied_and_the_rest_is_written(tmp_path: Path, copied: list[int]) -> None:
    path = write(tmp_path, 0)
    assert copied == [4 * BLOCK, path.stat().st_size - 4 * BLOCK]


@pytest.mark.usefixtures("sharing")
def test_blocks_that_lie_otherwise_are_written(tmp_path: Path, copied: list[int]) -> None:
    path = write(tmp_path, 8)
    assert copied == [0, path.stat().st_size]


def test_elsewhere_the_kernel_is_not_asked(tmp_path: Path, copied: list[int]) -> None:
    assert file_system_of(tmp_path) not in shard_writer.SHARING_FILE_SYSTEMS
    path = write(tmp_path, 0)
    assert copied == [0, path.stat().st_size]


@pytest.mark.usefixtures("sharing")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shift=st.sampled_from([0, 1, BLOCK // 2]), size=st.integers(0, len(DATA)))
def test_same_bytes_of_every_size(tmp_path: Path, shift: int, size: int) -> None:
    write(tmp_path, shift, size)


def _short(most: int) -> Callable[..., int]:
    copy = os.copy_file_range
    return lambda source, target, count, at, to: copy(source, target, min(count, most), at, to)


def _stops(number: int) -> Callable[..., int]:
    """One block, and then an error, or nothing."""
    copy, calls = os.copy_file_range, []

    def stopping(source: int, target: int, _count: int, at: int, to: int) -> int:
        calls.append(at)
        if len(calls) == 1:
            return copy(source, target, BLOCK, at, to)
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    return stopping


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize(
    "call",
    [_short(100), _stops(0), *(_stops(getattr(errno, name)) for name in ("EXDEV", "EINVAL", "EOPNOTSUPP", "EPERM"))],
    ids=["short", "nothing", "EXDEV", "EINVAL", "EOPNOTSUPP", "EPERM"],
)
def test_what_the_kernel_does_not_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., int]
) -> None:
    monkeypatch.setattr(os, "copy_file_range", call)
    write(tmp_path, 0)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", _stops(number))
    with pytest.raises(OSError) as caught:
        write(tmp_path, 0)
    assert caught.value.errno == number
