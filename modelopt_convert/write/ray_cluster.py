"""Write shards as tasks of a Ray cluster. No torch.

Ray places the tasks, and does those again whose worker died. Workers touch nothing but the stage; what they wrote is
checked and published here.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from pathlib import Path
from typing import Any

from modelopt_convert import __version__
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.plan.plan import Origin
from modelopt_convert.run.errors import Interrupted, RemoteError
from modelopt_convert.run.progress import Progress
from modelopt_convert.stage import fsops
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.write.attempt import ATTEMPTS, ShardJob, not_shared, pack
from modelopt_convert.write.part import part_of
from modelopt_convert.write.task import ShardResult, ShardTask

RETRIES = 3  # of a task whose worker died; what a task itself raises is final
_CONNECT_S = 5.0
_GRACE_S = 30.0  # for tasks to stop at their next piece
_START = (
    "start a cluster with `ray start --head`, or name one in RAY_ADDRESS; one that authenticates by token needs "
    "RAY_AUTH_MODE=token here too"
)


def connect(ray: Any) -> None:
    """Join the cluster of RAY_ADDRESS, or else the one that runs on this machine.

    Raises:
        RemoteError: ``executor.no_cluster``.
        Interrupted: By SIGTERM, of which Ray makes a SystemExit meanwhile.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:  # also of another Python or Ray than the cluster's
        raise RemoteError(
            f"--executor ray: no Ray cluster can be joined: {error}", code="executor.no_cluster", hint=_START
        ) from error
    except SystemExit:
        raise Interrupted(signal.SIGTERM) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, and leaves it


def _knock(address: str) -> None:
    """Find out in seconds that nobody is there, which takes Ray a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def on_ray(
    ray: Any,
    stage: StagingDir,
    tasks: Sequence[ShardTask],
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    workers: int,
    gpu: object,
) -> list[ShardResult]:
    """The executor of a cluster; the GPU of this machine has no part in it.

    Raises:
        MoptError: What a task raised, as it was raised; ``executor.lost`` or ``executor.shared_filesystem``.
    """
    fsops.make_dir(stage.path / ATTEMPTS, 0o777)
    # More than a node has would never be placed. The bytes do not depend on it.
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    workers = max(1, min(workers, largest))
    remote = ray.remote(num_cpus=workers, max_retries=RETRIES, retry_exceptions=False)(portable_attempt())
    progress.begin(f"write {len(tasks)} files on Ray", sum(task.data_bytes for task in tasks))
    references: dict[Future[ShardResult], Any] = {}
    done: dict[str, ShardResult] = {}
    try:
        waiting: dict[Future[ShardResult], ShardTask] = {}
        for task in tasks:
            parts = {origin: part_of(reader, origin, task) for origin, reader in readers.items()}
            job = ShardJob(task, parts, stage.path, workers, stage.mode_for(task.file))
            reference = remote.remote(__version__, pack(job))
            # Waiting on futures and not in ray.get, in which a signal's exception would be lost.
            future = reference.future()
            references[future], waiting[future] = reference, task
        for future in as_completed(waiting):
            task = waiting[future]
            done[task.file] = _result(ray, future, task)
            _check_seen(stage.path / task.file, done[task.file])
            progress.detail(f"{task.file}: written")
            progress.advance(task.data_bytes)
    except BaseException:
        _cancel(ray, references)
        raise
    # With what attempts left whose worker died.
    fsops.remove_tree(stage.path / ATTEMPTS)
    return [done[task.file] for task in tasks]


def portable_attempt() -> Callable[[str, bytes], ShardResult]:
    """``attempt_packed``, as a function that travels by value: a node without mopt is then told from a bug."""

    def attempt(version: str, packed: bytes) -> "ShardResult":  # a class of ours would travel with the function
        from modelopt_convert.write.attempt import attempt_packed

        return attempt_packed(version, packed)

    return attempt


def _result(ray: Any, future: "Future[ShardResult]", task: ShardTask) -> ShardResult:
    try:
        return future.result()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ImportError):
            raise RemoteError(
                f"{task.file}: a node of the Ray cluster cannot import mopt {__version__}: {error.cause}",
                code="executor.version",
                hint="install the same version on every node",
            ) from error
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RemoteError(
            f"{task.file}: no worker of the Ray cluster finished it: {error}",
            code="executor.lost",
            hint="see what ended the workers (memory, a node that went away), then run again",
        ) from error


def _check_seen(path: Path, result: ShardResult) -> None:
    """A worker says that it wrote the file; here it must be, and whole."""
    size = path.stat().st_size if path.exists() else None
    if size != result.num_bytes:
        raise not_shared(f"{path}: a worker wrote {result.num_bytes} bytes, here are {size or 'none'}", path)


def _cancel(ray: Any, references: "Mapping[Future[ShardResult], Any]") -> None:
    """Stop every task, and wait until none writes into the stage any more."""
    for force in (False, True):
        for future, reference in references.items():
            if not future.done():
                ray.cancel(reference, force=force)
        wait(references, timeout=_GRACE_S)
