"""The shard writer: every planned byte, once, at its place, or an error."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import xxhash
from checkpoint_folders import open_fds
from safetensors.torch import save

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.run.errors import InternalError
from modelopt_convert.stage import fsops, shard_writer
from modelopt_convert.stage.shard_writer import ShardWriter

SPECS = [TensorSpec("a", "U8", (5,)), TensorSpec("b", "BF16", (2, 3)), TensorSpec("none", "F32", (0, 4))]
CONTENT = {"a": b"\x01\x02\x03\x04\x05", "b": bytes(range(12)), "none": b""}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def expected() -> bytes:
    """The bytes that safetensors writes."""
    bits = torch.frombuffer(bytearray(CONTENT["b"]), dtype=torch.bfloat16).reshape(2, 3)
    tensors = {"a": torch.tensor(list(CONTENT["a"]), dtype=torch.uint8), "b": bits, "none": torch.zeros(0, 4)}
    return save(tensors, {"format": "pt"})


def write(path: Path, content: dict[str, bytes] = CONTENT) -> ShardWriter:
    with ShardWriter(path, SPECS) as writer:
        for name, raw in content.items():
            writer.write(name, [raw])
    return writer


@pytest.mark.parametrize("order", [["a", "b", "none"], ["none", "b", "a"]])
def test_same_bytes_in_whatever_order(path: Path, expected: bytes, order: list[str]) -> None:
    writer = write(path, {name: CONTENT[name] for name in order})
    assert path.read_bytes() == expected
    assert writer.num_bytes == len(expected)
    assert [spec.name for spec in writer.layout] == ["none", "b", "a"]
    assert writer.durable
    assert not open_fds(path.parent)


def test_digests_are_xxh3_of_the_bytes_in_whatever_pieces(path: Path, expected: bytes) -> None:
    with ShardWriter(path, SPECS) as writer:
        for name, raw in CONTENT.items():
            writer.write(name, (memoryview(raw)[at : at + 2] for at in range(0, len(raw), 2)))
            assert writer.digests[name] == xxhash.xxh3_128(raw).hexdigest()
    assert writer.digests.keys() == CONTENT.keys()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("metadata", [{}, {"a": 'quote " \\ \n \x1f \x7f \u2028 \U0001f600'}])
def test_other_metadata(path: Path, metadata: dict[str, str]) -> None:
    with ShardWriter(path, SPECS[:1], metadata) as writer:
        writer.write("a", [CONTENT["a"]])
    tensor = torch.tensor(list(CONTENT["a"]), dtype=torch.uint8)
    assert path.read_bytes() == save({"a": tensor}, metadata or None)


def test_the_file_has_its_size_before_any_tensor_is_written(path: Path, expected: bytes) -> None:
    with pytest.raises(InternalError), ShardWriter(path, SPECS):
        assert path.stat().st_size == len(expected)
        head = 8 + int.from_bytes(expected[:8], "little")
        assert path.read_bytes()[:head] == expected[:head]


def test_a_missing_tensor_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(InternalError) as caught, ShardWriter(path, SPECS) as writer:
        writer.write("a", [CONTENT["a"]])
    assert caught.value.code == "internal.shard_incomplete"
    assert "2 tensors" in caught.value.message and "'b'" in caught.value.message
    assert not open_fds(path.parent) and not synced


def test_an_empty_tensor_is_no_exception(path: Path) -> None:
    with pytest.raises(InternalError) as caught:
        write(path, {"a": CONTENT["a"], "b": CONTENT["b"]})
    assert caught.value.code == "internal.shard_incomplete"
    assert "'none'" in caught.value.message


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("c", [b""]),
        ("__metadata__", [b""]),
        ("b", [CONTENT["b"]]),
        ("a", [b"123456"]),
        ("a", [b"12345", b"6"]),
        ("a", [b"1234"]),
        ("a", []),
        ("none", [b"1"]),
    ],
    ids=["unknown", "metadata", "twice", "too many", "one more chunk", "too few", "none", "for an empty tensor"],
)
def test_what_was_not_planned(path: Path, expected: bytes, name: str, chunks: list[bytes]) -> None:
    with pytest.raises(InternalError) as caught, ShardWriter(path, SPECS) as writer:
        writer.write("b", [CONTENT["b"]])
        writer.write(name, chunks)
    assert caught.value.code == "internal.shard_write"
    assert repr(name) in caught.value.message
    assert not open_fds(path.parent)
    # Nothing was written outside the tensor's own place.
    assert len(path.read_bytes()) == len(expected)
    start = expected.index(CONTENT["a"])
    assert path.read_bytes()[:start] == expected[:start]


def test_a_view_of_wide_elements_is_counted_in_bytes(path: Path) -> None:
    """Sixteen elements of 4 bytes for a tensor of 16 bytes: must not run over the next tensor."""
    with ShardWriter(path, [TensorSpec("a", "U8", (16,)), TensorSpec("b", "U8", (16,))]) as writer:
        writer.write("b", [b"b" * 16])
        with pytest.raises(InternalError):
            writer.write("a", [memoryview(numpy.zeros(16, dtype=numpy.int32))])
        writer.write("a", [b"a" * 16])
    assert path.read_bytes().endswith(b"a" * 16 + b"b" * 16)


def test_an_error_of_the_source_goes_through_and_closes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    def source() -> Iterator[bytes]:
        yield b"12"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ShardWriter(path, SPECS) as writer:
        writer.write("a", source())
    assert not open_fds(path.parent) and not synced
    assert "a" not in writer.digests


def test_short_writes_are_continued(path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, sizes = os.pwrite, []

    def short(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", short)
    write(path)
    assert path.read_bytes() == expected
    assert max(sizes) > 3  # the writer did ask for more


def _no_space(fd: int, *_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("call", "replacement", "number"),
    [
        ("pwrite", lambda fd, data, offset: 0, errno.EIO),
        ("pwrite", _no_space, errno.ENOSPC),
        ("posix_fallocate", _no_space, errno.ENOSPC),
        ("fsync", _no_space, errno.ENOSPC),
    ],
    ids=["no bytes taken", "pwrite", "posix_fallocate", "fsync"],
)
def test_errors_of_the_disk_go_through_and_close(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, replacement: Callable[..., int], number: int
) -> None:
    monkeypatch.setattr(os, call, replacement)
    with pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno == number
    assert not open_fds(path.parent)


def test_a_file_system_without_fsync_is_told(path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unsupported)
    assert write(path).durable is False
    assert path.read_bytes() == expected


def test_the_file_is_synced_once_and_last(path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda fd: on_disk.append(path.read_bytes()))
    assert write(path).durable
    assert on_disk == [expected]


def test_the_disk_is_told_early_what_was_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a large tensor but the last few, once, after it was written."""
    told: list[range] = []
    size = (40 << 20) + 5

    def start_writeback(fd: int, offset: int, num_bytes: int) -> None:
        assert set(os.pread(fd, num_bytes, offset)) == {7}
        told.append(range(offset, offset + num_bytes))

    monkeypatch.setattr(fsops, "start_writeback", start_writeback)
    with ShardWriter(path, [TensorSpec("a", "U8", (size,))]) as writer:
        begin = writer.num_bytes - size
        piece = b"\x07" * (3 << 20)
        writer.write("a", (piece[: min(len(piece), size - at)] for at in range(0, size, len(piece))))
    assert [one.start for one in told] == [begin, *(one.stop for one in told[:-1])]
    assert 0 < writer.num_bytes - told[-1].stop < 12 << 20


@pytest.mark.parametrize("library", ["without", "failing"])
def test_a_disk_that_cannot_be_told_is_no_error(
    path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    def fails(*_arguments: object) -> int:
        return -1

    monkeypatch.setattr(
        fsops, "_libc", SimpleNamespace if library == "without" else lambda: SimpleNamespace(sync_file_range=fails)
    )
    monkeypatch.setattr(shard_writer, "_WRITEBACK_BYTES", 1)
    write(path)
    assert path.read_bytes() == expected


def test_what_exists_is_not_overwritten(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        ShardWriter(path, SPECS)
    assert path.read_bytes() == b"mine"
    dangling = tmp_path / "link.safetensors"
    dangling.symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        ShardWriter(dangling, SPECS)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_respects_the_umask(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == mode


def test_names_that_cannot_be_written_leave_no_file(path: Path) -> None:
    with pytest.raises(ValueError, match="given twice"):
        ShardWriter(path, [SPECS[0], SPECS[0]])
    assert not path.exists()
