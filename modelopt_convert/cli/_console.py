"""Standard streams that may be closed, full, or read by somebody who leaves."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO


def open_streams() -> None:
    """Fill closed standard descriptors, or the first shard would become stderr and be written into.

    What a stream's encoding does not have is escaped there, whoever prints it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Let go of what cannot be written: Python would end with a code of its own if it failed on it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by whoever started us
                stream.flush()
        except OSError:
            drop(stream)


def drop(stream: TextIO) -> None:
    """Let what is still buffered go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Whoever reads stdout may close it early (``| head``); the exit code still tells what happened.

    Raises:
        OSError: stdout cannot be written for another reason.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
