"""Runs mopt on a Ray cluster in a process of its own, with what a test wants to go wrong.

``ray_driver.py FAULT FOLDER ARGUMENT ...`` is one command line; with ``ray_driver.py batch``, stdin holds several as
JSON, and stdout gets how each ended. Functions of a main program travel to the workers by value, so nothing that ships
knows of any of this.
"""

import contextlib
import errno
import functools
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray.cloudpickle

from modelopt_convert.cli import main
from modelopt_convert.write import ray_cluster as ray_executor


def killed_once(folder: Path, version: str, packed: bytes) -> Any:
    """The first worker to have written the first tensor of a shard dies, by the hand that cannot be caught."""
    from modelopt_convert.stage import shard_writer
    from modelopt_convert.write import attempt

    write = shard_writer.ShardWriter.write

    def half(self: shard_writer.ShardWriter, name: str, *more: Any) -> None:
        write(self, name, *more)
        assert len(self.layout) > 1
        with contextlib.suppress(FileExistsError), (folder / "killed").open("x") as file:
            file.write(f"{self.path}\n{self.path.stat().st_size}\n")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    shard_writer.ShardWriter.write = half
    try:
        return attempt.attempt_packed(version, packed)
    finally:
        shard_writer.ShardWriter.write = write


def killed_always(folder: Path, version: str, packed: bytes) -> Any:
    """No worker lives long enough."""
    os.kill(os.getpid(), signal.SIGKILL)


def endless(folder: Path, version: str, packed: bytes) -> Any:
    """A task that goes on until it is told to stop, and then notes whether its stage still stands."""
    from modelopt_convert.write.attempt import unpack

    stage = unpack(packed).stage
    (folder / f"begun-{os.getpid()}").touch()
    try:
        for _ in range(3000):
            time.sleep(0.1)  # Ray stops a task between two steps of the interpreter
    finally:
        (folder / f"ended-{os.getpid()}").write_text(str(stage.is_dir()))


def unseen(folder: Path, version: str, packed: bytes) -> Any:
    """A node on which the stage is not what the driver made."""
    from modelopt_convert.write import attempt

    with mock.patch.object(attempt, "ATTEMPTS", "elsewhere"):
        return attempt.attempt_packed(version, packed)


def lost(folder: Path, version: str, packed: bytes) -> Any:
    """A file that was written and cannot be seen by the driver."""
    from modelopt_convert.write import attempt

    result = attempt.attempt_packed(version, packed)
    job = attempt.unpack(packed)
    (job.stage / job.task.file).unlink()
    return result


def full(folder: Path, version: str, packed: bytes) -> Any:
    """A disk without room, there."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")


def without_mopt(folder: Path, version: str, packed: bytes) -> Any:
    """A node on which mopt is not installed gets what really travels."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt_convert"]:
            del sys.modules[name]
        sys.modules["modelopt_convert"] = None
        return pickle.loads((folder / "attempt").read_bytes())(version, packed)


def buggy(folder: Path, version: str, packed: bytes) -> Any:
    """A bug."""
    raise ZeroDivisionError("there")


WORKERS = {one.__name__: one for one in (killed_once, killed_always, endless, unseen, lost, full, without_mopt, buggy)}


@contextlib.contextmanager
def planted(fault: str, folder: Path) -> Iterator[None]:
    """The fault of that name: of a worker, or of the driver."""
    with contextlib.ExitStack() as stack:
        if fault in WORKERS:

            def attempt(version: str, packed: bytes) -> Any:
                return one(folder, version, packed)

            one = WORKERS[fault]
            if fault == "without_mopt":
                (folder / "attempt").write_bytes(ray.cloudpickle.dumps(ray_executor.portable_attempt()))
            stack.enter_context(mock.patch.object(ray_executor, "portable_attempt", lambda: attempt))
            if fault == "killed_always":  # Ray waits longer before each retry
                stack.enter_context(mock.patch.object(ray_executor, "RETRIES", 0))
            if fault == "endless":  # on a busy machine, too, the task is to stop by itself
                stack.enter_context(mock.patch.object(ray_executor, "_GRACE_S", 150.0))
        elif fault == "other_version":
            stack.enter_context(mock.patch.object(ray_executor, "__version__", "0.0.0"))
        elif fault.startswith("touched "):

            @functools.wraps(ray_executor.on_ray)
            def touching(*words: Any) -> Any:
                os.utime(fault.removeprefix("touched "))
                return on_ray(*words)

            on_ray = ray_executor.on_ray
            stack.enter_context(mock.patch.object(ray_executor, "on_ray", touching))
        elif fault == "no_cluster":
            stack.enter_context(mock.patch.dict(os.environ, {"RAY_ADDRESS": "127.0.0.1:1"}))
        yield


def batch() -> None:
    """Every command of stdin, one after the other."""
    from support import run_mopt

    outcomes = []
    for fault, folder, arguments in json.load(sys.stdin):
        with planted(fault, Path(folder)):
            outcomes.append(run_mopt(*arguments))
    print(json.dumps([[one.exit_code, one.stdout, one.stderr] for one in outcomes]))


if __name__ == "__main__":
    if sys.argv[1] == "batch":
        batch()
    else:
        with planted(sys.argv[1], Path(sys.argv[2])):
            sys.argv[1:] = sys.argv[3:]
            main()
