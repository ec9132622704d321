"""Several tensors at a time: the same bytes, the same first error, and nothing left running."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import edit, run_mopt, tree

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.proof import nvfp4
from modelopt_convert.run.workers import Stopped, default_workers, in_order, until
from modelopt_convert.verification.levels.record import scan


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    gate = threading.Event()

    def work(job: int, _stopped: threading.Event) -> int:
        if job == 0 and workers > 1:
            gate.wait(10)  # the first job ends after the last
        if job == 19:
            gate.set()
        return job * job

    assert in_order(range(20), work, workers) == [job * job for job in range(20)]


def test_one_worker_is_the_calling_thread() -> None:
    assert set(in_order(range(3), lambda _job, _stopped: threading.current_thread(), 1)) == {threading.current_thread()}
    assert threading.current_thread() not in in_order(range(3), lambda _job, _stopped: threading.current_thread(), 2)


def test_the_first_error_in_order_is_raised_and_the_others_are_stopped() -> None:
    ended: list[int] = []

    def work(job: int, stopped: threading.Event) -> None:
        if job in (3, 4):
            raise ValueError(str(job))
        if job > 4:
            if stopped.wait(10):
                ended.append(job)
                raise Stopped
            raise AssertionError("nobody said stop")

    with pytest.raises(ValueError, match="3"):
        in_order(range(40), work, 4)
    assert ended
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]


def test_default_is_within_reason() -> None:
    assert default_workers() == min(8, len(os.sched_getaffinity(0)))


def test_no_worker_opens_threads_of_torch(
    exports: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen workers of sixteen threads each wait for each other."""
    seen = list[int]()

    class Watched(ThreadPoolExecutor):
        def submit(self, work: Callable[..., Any], /, *words: Any, **more: Any) -> Future[Any]:
            def watched() -> Any:
                seen.append(torch.get_num_threads())
                return work(*words, **more)

            return super().submit(watched)

    monkeypatch.setattr("modelopt_convert.run.workers.ThreadPoolExecutor", Watched)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    out, more = tmp_path / "out", ("--workers", "3")
    build = ("build-nvfp4", "--preset", "flux1-dev", "--base", base, "--output", out, "--verify", "cpu", *more)
    try:
        for words in (
            (*build, "--export", exports / "nvfp4"),
            (*build, "--overwrite"),
            ("verify", out, "--base", base, "--device", "cpu", *more),
        ):
            assert run_mopt(*words).exit_code == 0
            assert seen and set(seen) == {1}, words
            seen.clear()
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


def test_four_workers_at_most_are_at_small_calls(
    exports: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, lock, within, most = nvfp4.ENTRY.look, threading.Lock(), 0, list[int]()

    def counted(*words: Any) -> Any:
        nonlocal within
        with lock:
            within += 1
            most.append(within)
        time.sleep(0.02)
        try:
            return look(*words)
        finally:
            with lock:
                within -= 1

    monkeypatch.setattr(type(nvfp4.ENTRY), "look", staticmethod(counted))
    out, more = tmp_path / "out", ("--workers", "9")
    for words in (
        ("build-nvfp4", "--export", exports / "nvfp4", "--preset", "flux1-dev", "--output", out, "--verify", "off"),
        ("verify", out, "--device", "cpu"),
    ):
        assert run_mopt(*words, "--base", base, *more).exit_code == 0
        assert max(most) == 4, words
        most.clear()


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "none"])
def test_bytes_do_not_depend_on_the_number_of_workers(name: str, exports: Path, base: Path, tmp_path: Path) -> None:
    command = "convert-fp8" if name == "fp8" else "build-nvfp4"
    sources = ("--base", base) if name == "none" else ("--export", exports / name, "--base", base)
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        where = ("--preset", "flux1-dev", "--output", out, "--workers", workers, "--max-shard-size", "900kB")
        assert run_mopt(command, *sources, *where).exit_code == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "5")


def test_the_error_does_not_depend_on_them_either(exports: Path, base: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.attn.to_k.weight"):
            tensors[name].view(-1)[0] = float("nan")

    broken = edit(base, tmp_path / "broken", damage)
    found = [
        run_mopt("build-nvfp4", "--preset", "flux1-dev", "--base", broken, "--output", tmp_path / "o", "--workers", n)
        for n in (1, 4)
    ]
    assert found[0].exit_code == 3 and found[0].message == found[1].message
    assert not (tmp_path / "o").exists()


def test_a_rewrite_with_several_workers(built_nvfp4: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        done = run_mopt("swap-nibbles", built_nvfp4, tmp_path / f"s{workers}", "--workers", workers)
        assert done.exit_code == 0
    assert tree(tmp_path / "s1") == tree(tmp_path / "s3")


def test_a_scan_stops_between_two_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor that cannot be read ends it, however much of another is still to be read."""
    names = {name: torch.zeros(4, dtype=torch.float8_e4m3fn) for name in ("a.weight", "b.weight")}
    save_file(names, tmp_path / "x.safetensors")
    begun, pieces = threading.Event(), []

    def buffered(reader: CheckpointReader, name: str, _size: int) -> Iterator[memoryview]:
        if name == "a.weight":
            assert begun.wait(30)
            raise ZeroDivisionError
        for number in range(3000):
            begun.set()
            pieces.append(number)
            time.sleep(0.01)
            yield memoryview(bytearray(4))

    monkeypatch.setattr(CheckpointReader, "buffered", buffered)
    with CheckpointReader(tmp_path / "x.safetensors") as reader, pytest.raises(ZeroDivisionError):
        scan(reader, None, 2, lambda _bytes: None)
    assert len(pieces) < 3000


def test_pieces_come_until_it_is_told_to_stop() -> None:
    stopped, found = threading.Event(), []
    with pytest.raises(Stopped):
        for piece in until(stopped, range(10)):
            found.append(piece)
            if piece == 3:
                stopped.set()
    assert found == [0, 1, 2, 3]
