"""Calls that end: what brings less than a least number of bytes in a given time is given up.

Timeouts of an HTTP library begin anew with every byte, those of a resolver or of hf_xet are others still, and none of
these libraries can be stopped from outside. So each call runs in a thread of its own, which is left to itself when the
time is over: such a thread never keeps the process alive.
"""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
# An answer is whole in this time, all attempts included; an upload moves its least number of bytes in it.
ANSWER_S = 100.0
# A range brings its least number of bytes in this time. A new attempt begins as long as the second has not passed
# since the last one that did: with what the last attempt takes that makes less than 120 s.
STALL_S = 20.0
PATIENCE_S = 70.0
LEAST_BYTES = 16 << 10
LEAST_BYTES_SENT = 256 << 10
_ACKED_AND_RECEIVED = struct.Struct("=120xQQ")  # of the kernel's struct tcp_info


class StalledError(Exception):
    """What was asked for did not come in time; the text says in which."""


def watched(
    call: Callable[[], _T],
    seconds: float,
    *,
    moved: Callable[[], int] = lambda: 0,
    least: int = LEAST_BYTES,
    stopped: threading.Event | None = None,
) -> _T:
    """What ``call`` returns or raises.

    Args:
        call: Runs in another thread, to its end even if nobody waits any more.
        seconds: After so long without ``least`` more bytes it is given up.
        moved: How many bytes the call has brought so far; without it the whole call has ``seconds``.
        least: How many bytes are progress.
        stopped: Once this is set, nobody waits any more.

    Raises:
        StalledError: It was given up.
        CancelledError: ``stopped`` was set.
    """
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="hub-call", daemon=True).start()
    since, before = time.monotonic(), moved()
    while not wait([outcome], timeout=seconds / 100).done:
        if stopped is not None and stopped.is_set():
            raise CancelledError
        if (now := moved()) - before >= least:
            since, before = time.monotonic(), now
        elif time.monotonic() - since > seconds:
            came = f"{now - before} bytes" if now else "no whole answer"
            raise StalledError(f"{came} in {seconds:.0f} s")
    return outcome.result()


class Traffic:
    """Bytes that this process has sent, received and read from disk, as the kernel counts them.

    Uploads say nothing of their progress, least of all those of hf_xet. What is read counts too: before an upload,
    and where all is known there already, a file is only read.
    """

    def __init__(self) -> None:
        """Begin with what has been counted so far."""
        self._seen: dict[str, int] = {}
        self._total = 0

    def __call__(self) -> int:
        """The sum."""
        for fd in Path("/proc/self/fd").iterdir():
            try:
                name = str(fd.readlink())
                if not name.startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(fd.name))) as one:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AND_RECEIVED.size)
                now = sum(_ACKED_AND_RECEIVED.unpack(info))
            except (OSError, struct.error):  # no TCP, or closed meanwhile; or the kernel does not count
                continue
            self._total += max(0, now - self._seen.get(name, 0))
            self._seen[name] = now
        return self._total + _bytes_read()


def _bytes_read() -> int:
    try:
        with Path("/proc/self/io").open("rb") as file:
            return int(file.readline().split()[1])
    except OSError:  # some kernels do not count
        return 0
