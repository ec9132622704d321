"""Run independent jobs on a few threads. No torch."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Semaphore
from typing import TypeVar

from modelopt_convert.run.errors import InputError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_Piece = TypeVar("_Piece")
_MOST = 8  # beyond, disks and memory are the limit (docs/performance.md), and each worker has its buffers
_AT_THE_LOCK = Semaphore(4)  # of the process, as Python's lock is


class Stopped(Exception):  # noqa: N818 - nothing went wrong with the job
    """Raised by a job that was told to stop, since another one failed."""


def default_workers() -> int:
    """As many as there are cores to run on, within reason."""
    return max(1, min(_MOST, len(os.sched_getaffinity(0))))


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Workers are threads enough: torch's own would only wait for each other over small pieces."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def small_calls() -> Iterator[None]:
    """Around work on a few rows, which is many short calls: no more than four workers are in it at a time.

    Each call takes Python's lock anew. On 16 cores four workers made it twice as fast as one, and 16 no faster: they
    woke each other up.
    """
    with _AT_THE_LOCK:
        yield


def until(stopped: Event, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """The pieces of a job, as long as it is not told to stop: else an interrupted run would wait for a whole tensor.

    Raises:
        Stopped: It is.
    """
    for piece in pieces:
        if stopped.is_set():
            raise Stopped
        yield piece


def in_order(jobs: Sequence[_Job], work: Callable[[_Job, Event], _Result], workers: int) -> list[_Result]:
    """Do the jobs, up to ``workers`` of them at a time.

    Args:
        jobs: Independent of each other.
        work: Does one; it should look at the event now and then, and raise ``Stopped`` once that is set.
        workers: 1 for the calling thread itself.

    Returns:
        The results, in the order of the jobs.

    Raises:
        BaseException: What the first job that failed, in their order, raised; by then no job runs any more.
    """
    stopped = Event()
    if workers == 1:
        return [work(job, stopped) for job in jobs]
    with ThreadPoolExecutor(workers, thread_name_prefix="worker") as pool:
        futures = [pool.submit(work, job, stopped) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def all_in_order(
    jobs: Sequence[_Job], work: Callable[[_Job, Event], _Result], workers: int
) -> list[_Result | InputError]:
    """As ``in_order``, but a job whose input is at fault ends no other: its refusal stands in place of a result."""

    def told(job: _Job, stopped: Event) -> _Result | InputError:
        try:
            return work(job, stopped)
        except InputError as error:
            return error.with_traceback(None)  # whose frames would hold what was read

    return in_order(jobs, told, workers)
