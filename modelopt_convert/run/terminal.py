"""Whether a person watches, and the first thing to see. Nothing that takes time may be imported here."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person may look at it; None is a stream that whoever started us has closed."""
    return stream is not None and stream.isatty()


@contextmanager
def first_sign() -> Iterator[None]:
    """A line on a terminal while mopt itself is imported; the line is gone afterwards, and never there if quiet."""
    if {"-q", "--quiet"} & set(sys.argv) or not is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
        yield
        return
    with suppress(OSError):
        print("mopt: starting\r", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        with suppress(OSError):
            print("\x1b[2K", end="", file=sys.stderr, flush=True)
