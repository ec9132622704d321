"""Files that are cut: a record at every byte, a shard while it is read, an index that the record knows otherwise."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, SINGLE, write
from figures import note
from limited import sparse_file
from support import run_mopt

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import read_record
from modelopt_convert.run.errors import InputError

RECORD = {
    "schema": "mopt.manifest/1",
    "command": "build-nvfp4",
    "digests": {"algorithm": "xxh3-128", "tensors": {"a": "0" * 32}, "files": {"config.json": "0" * 32}},
    "proof": {"status": "pass", "modules": {"a": {"verdict": "reproduced"}}},
}


def test_a_record_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(RECORD, indent=1).encode()
    path = tmp_path / "mopt.json"
    path.write_bytes(whole)
    assert read_record(tmp_path) == RECORD
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as caught:
            read_record(tmp_path)
        assert caught.value.code == "record.json"
    note(7, file="mopt.json", lengths=len(whole), accepted=0)


@pytest.mark.parametrize("damage", ["cut", "a space", "an entry elsewhere", "gone"])
def test_verify_sees_a_damaged_index(damage: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "copy"))
    index = folder / INDEX
    text = index.read_text()
    if damage == "cut":
        index.write_text(text[:-10])
    elif damage == "a space":
        index.write_text(text + " ")
    elif damage == "an entry elsewhere":
        found = json.loads(text)
        names = sorted(set(found["weight_map"].values()))
        name = next(iter(found["weight_map"]))
        found["weight_map"][name] = next(other for other in names if other != found["weight_map"][name])
        index.write_text(json.dumps(found))
    else:
        index.unlink()
    outcome = run_mopt("verify", folder)
    wanted = {
        "cut": (3, "index.json"),
        "a space": (1, "check.verify"),
        "an entry elsewhere": (3, "index.mismatch"),
        "gone": (3, "index.missing"),
    }
    assert (outcome.exit_code, outcome.error_code) == wanted[damage], outcome.stderr
    assert damage != "a space" or f"file {INDEX} is not what was recorded" in outcome.stdout


CHUNK = 1 << 16


def test_a_shard_cut_by_another_thread_is_an_error(tmp_path: Path) -> None:
    """Read by mmap it would be SIGBUS, and by a loop that takes a short count for the end, a shorter tensor."""
    folder = write(tmp_path / "checkpoint", {})
    sparse_file(folder / SINGLE, [TensorSpec("a", "U8", (1 << 26,))])
    reading, cut = threading.Event(), threading.Event()

    def truncate() -> None:
        reading.wait()
        os.truncate(folder / SINGLE, 1 << 20)
        cut.set()

    thread = threading.Thread(target=truncate)
    thread.start()
    seen = 0
    with pytest.raises(InputError), CheckpointReader(folder) as reader, pytest.raises(InputError) as caught:
        for chunk in reader.chunks("a", CHUNK):
            assert len(chunk) == CHUNK
            seen += len(chunk)
            reading.set()
            if seen >= 1 << 19:
                cut.wait()
    thread.join()
    assert caught.value.code == "input.changed"
    assert 1 << 19 <= seen <= 1 << 20
    note(13, cases=1, sigbus=0, what="shard cut by a thread")


def test_signals_while_reading_change_nothing(tmp_path: Path) -> None:
    """Each signal may end a system call with EINTR."""
    content = torch.arange(1 << 22, dtype=torch.int32)
    folder = write(tmp_path / "checkpoint", {SINGLE: {"a": content}})
    arrived = 0

    def count(*_: object) -> None:
        nonlocal arrived
        arrived += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        with CheckpointReader(folder) as reader:
            raw = b""
            while not raw or arrived < 20:
                raw = b"".join(reader.chunks("a", CHUNK))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raw == content.numpy().tobytes()
    note(13, cases=1, what="reads under signals", signals=arrived)
