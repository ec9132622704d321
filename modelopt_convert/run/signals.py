"""What SIGINT, SIGTERM and SIGHUP do, from mopt's first instruction to its last. No torch.

Nothing that takes time may be imported here: what comes before the handlers dies of a signal as Python does.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from modelopt_convert.run.errors import InternalError, Interrupted, MoptError

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stopping() -> list[signal.Signals]:
    """The signals that stop a run; SIGHUP is none where it is ignored, as under nohup."""
    return [one for one in _STOPPING if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


def leave_at_once() -> None:
    """Until there is something to clean up, and without it, a signal ends the process with its code and one line."""
    for number in stopping():
        signal.signal(number, _leave)


def _leave(signum: int, _frame: FrameType | None) -> None:
    _say(f"error: stopped by signal {signum} [interrupted]")
    os._exit(128 + signum)


def _say(line: str) -> None:
    """Not by way of a stream of Python's, in the middle of whose work the signal may have come."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


@contextmanager
def signals_held() -> Iterator[None]:
    """Note the signals that stop a run, and let them act only at the end.

    A signal mask would not do: a mask belongs to one thread, and torch's threads would take the signal for the process.
    Handlers run in the main thread alone, so in other threads there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before = {number: signal.signal(number, lambda caught, _: noted.append(caught)) for number in stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    # After an error no signal acts: the run ends anyway, and what the error says of the disk matters more.
    if noted:
        signal.raise_signal(noted[0])


class Signals:
    """A run, with what signals do to it; a context manager.

    The first one is noted, and stops what runs under ``acting``, or is about to; a second one ends the process at once.
    """

    def __init__(self) -> None:
        """Nothing came yet."""
        self._came = False
        self._noted: int | None = None
        self._raised: int | None = None
        self._acts = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        """Note signals."""
        self._before = {number: signal.signal(number, self._take) for number in stopping()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As it was; but where the process is mopt's own, no signal changes any more how the run ended."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if handler is _leave else handler or signal.SIG_DFL)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """What a signal stops.

        Raises:
            Interrupted: One came, now or before.
        """
        self._acts, self._raised = True, None
        try:
            self._stop()
            yield
            self.insist()
        except Exception as error:
            # A library that was being imported may have kept the interruption to itself, and then be broken.
            if self._raised is None or (isinstance(error, MoptError) and not isinstance(error, InternalError)):
                raise
            raise Interrupted(self._raised) from error
        finally:
            self._acts = False

    def insist(self) -> None:
        """Interrupt again where a library kept an interruption to itself.

        Raises:
            Interrupted: One came, and whatever ran then went on.
        """
        if self._raised is not None:
            raise Interrupted(self._raised)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if self._came:
            os._exit(128 + signum)
        self._came, self._noted = True, signum
        _say("interrupted: cleaning up; once more to leave at once")
        if self._acts:
            self._stop()

    def _stop(self) -> None:
        if self._noted is not None:
            self._raised, self._noted = self._noted, None
            raise Interrupted(self._raised)
