"""Links, pipes, short reads, I/O errors, and files that change while they are read."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_folders import COMMIT, INDEX, SHARDS, WEIGHT_MAP, A, B, C, open_fds, reader_refusal, write

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import InputError


@pytest.mark.parametrize("file", [A, "config.json", INDEX])
def test_a_pipe_is_refused_and_does_not_hang(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    os.mkfifo(sharded / file)
    rescued = threading.Event()

    def rescue() -> None:
        rescued.set()
        os.close(os.open(sharded / file, os.O_RDWR))  # lets a blocked open of the other end return

    timer = threading.Timer(30, rescue)
    timer.start()
    try:
        assert reader_refusal(sharded).code == "input.not_regular"
    finally:
        timer.cancel()
    assert not rescued.is_set()


def test_links_inside_the_folder_are_followed(sharded: Path) -> None:
    (sharded / "real").mkdir()
    for file in (A, "config.json", INDEX):
        (sharded / file).rename(sharded / "real" / file)
        (sharded / file).symlink_to(f"real/{file}")
    with CheckpointReader(sharded) as reader:
        assert reader.tensors.keys() == WEIGHT_MAP.keys()
    # The folder itself may be reached by a link: the user named it.
    link = sharded.with_name("link")
    link.symlink_to(sharded)
    with CheckpointReader(link) as reader:
        assert reader.tensors.keys() == WEIGHT_MAP.keys()


def hub_snapshot(cache: Path, component: str) -> Path:
    """A snapshot as huggingface_hub lays it out, every file a link into ``blobs``."""
    repo = cache / "models--some--model"
    folder = write(repo / "snapshots" / COMMIT / component, SHARDS, WEIGHT_MAP)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(os.listdir(folder))):
        blob = repo / "blobs" / f"{number:040x}"
        (folder / file).rename(blob)
        (folder / file).symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.mark.parametrize("component", ["", "transformer"])
def test_a_hub_cache_snapshot_may_link_to_its_blobs(tmp_path: Path, component: str) -> None:
    folder = hub_snapshot(tmp_path, component)
    with CheckpointReader(folder) as reader:
        found = reader.identity()
        assert (found["origin"], found["repo"], found["commit"]) == ("cache", "some/model", COMMIT)
        assert reader.read("b.weight") == bytes(SHARDS[B]["b.weight"].tolist())


@pytest.mark.parametrize("target", ["models--some--other/blobs/x", "models--some--model/refs/x", "x"])
def test_a_hub_cache_snapshot_may_link_nowhere_else(tmp_path: Path, target: str) -> None:
    folder = hub_snapshot(tmp_path, "")
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (folder / A).resolve().rename(tmp_path / target)
    (folder / A).unlink()
    (folder / A).symlink_to(f"../../../{target}")
    assert reader_refusal(folder).code == "input.symlink_escape"


def test_a_file_cut_while_open_is_an_error_and_not_a_crash(sharded: Path) -> None:
    with pytest.raises(InputError), CheckpointReader(sharded) as reader:
        os.truncate(sharded / B, reader.tensors["b.weight"].start + 2)
        with pytest.raises(InputError) as caught:  # at once, not only at the end
            reader.read("b.weight")
    assert caught.value.code == "input.changed"
    assert B in caught.value.message
    assert open_fds(sharded) == []


@pytest.mark.parametrize("change", ["grown", "cut", "touched"])
def test_a_file_changed_while_open_is_reported_at_the_end(sharded: Path, change: str) -> None:
    status = (sharded / C).stat()
    with pytest.raises(InputError) as caught, CheckpointReader(sharded) as reader:
        reader.read("c.weight")
        if change != "touched":
            os.truncate(sharded / C, status.st_size + (1 if change == "grown" else -1))
        # The time alone, by the smallest step, and the size alone: either must do.
        os.utime(sharded / C, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "touched")))
    assert caught.value.code == "input.changed"
    assert open_fds(sharded) == []


def test_a_change_does_not_hide_what_failed_before(sharded: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointReader(sharded):
        os.truncate(sharded / C, 1)
        raise KeyboardInterrupt
    assert open_fds(sharded) == []


def test_short_reads_are_continued(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    with CheckpointReader(sharded) as reader:
        for name, file in WEIGHT_MAP.items():
            assert reader.read(name) == SHARDS[file][name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_an_io_error_names_the_file(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught, CheckpointReader(sharded) as reader:
        monkeypatch.setattr(os, "pread", fail)
        reader.read("a.weight")
    assert caught.value.errno == errno.EIO and caught.value.filename.endswith(A)
