"""Tensors read piece by piece into one buffer: the same bytes as read whole, and the same errors."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buffered")
    tensors = {"a": torch.arange(1000, dtype=torch.int32), "b": torch.empty(0), "c": torch.ones(3)}
    save_file(tensors, path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


@settings(deadline=None)
@given(size=st.integers(50, 5000))
def test_pieces_are_the_tensor(folder: Path, size: int) -> None:
    with CheckpointReader(folder) as reader:
        for name in reader.tensors:
            pieces = [bytes(piece) for piece in reader.buffered(name, size)]
            assert b"".join(pieces) == reader.read(name) and all(0 < len(piece) <= size for piece in pieces)


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    with CheckpointReader(folder) as reader:
        wanted = reader.read("a")
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:3]], offset))
        assert b"".join(bytes(piece) for piece in reader.buffered("a", 700)) == wanted


def test_errors_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, views: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with CheckpointReader(folder) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failed:
            list(reader.buffered("a", 700))
        assert failed.value.errno == errno.EIO and Path(failed.value.filename).parent == folder
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0)
        with pytest.raises(InputError) as error:
            list(reader.buffered("a", 700))
        assert error.value.code == "input.changed"
