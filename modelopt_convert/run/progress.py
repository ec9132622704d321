"""How far the work is, for whoever watches. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Forwards(int):
    """A total that counts forwards of a model: of a phase that is not measured in bytes."""

    __slots__ = ()


class Progress(Protocol):
    """What the work tells whoever watches."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins; a total of ``Forwards`` counts these, and ``advance`` does then, too."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def announce(self, text: str) -> None:
        """One line that is to be read before the work."""

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""


class ProgressFailed(BaseException):
    """What a caller's progress raised, on its way to the caller: nobody in between may take it for an error of theirs.

    Attributes:
        error: The caller's exception.
    """

    def __init__(self, error: Exception) -> None:
        """Carry the caller's exception."""
        super().__init__(error)
        self.error = error


class Guarded:
    """A caller's progress; what it raises becomes a ProgressFailed."""

    def __init__(self, progress: Progress) -> None:
        """Pass everything on."""
        self._progress = progress

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins."""
        with _failing():
            self._progress.begin(what, total_bytes)

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        with _failing():
            self._progress.advance(num_bytes)

    def announce(self, text: str) -> None:
        """One line that is to be read before the work."""
        with _failing():
            self._progress.announce(text)

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""
        with _failing():
            self._progress.detail(text)


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ProgressFailed(error) from None


class Unwatched:
    """Progress that nobody watches."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, num_bytes: int) -> None:
        """Nothing."""

    def announce(self, text: str) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""
