"""How far the work is, for whoever watches. No torch."""

from typing import Protocol


class Progress(Protocol):
    """What the work tells whoever watches."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def announce(self, text: str) -> None:
        """One line that is to be read before the work."""

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""


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
