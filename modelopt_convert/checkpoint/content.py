"""The digest of all bytes of a checkpoint, taken while they are read for something else. No torch."""

from collections.abc import Mapping
from threading import Lock

import xxhash

from modelopt_convert.checkpoint.digests import content_digest
from modelopt_convert.checkpoint.header import TensorInfo

CONTENT = "content_xxh3_128"
"""Its key in the identity of a checkpoint."""


class _Begun:
    """The digest of a tensor up to a byte."""

    __slots__ = ("digest", "end", "lock")

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self.end = 0
        self.lock = Lock()


class Content:
    """Digests tensors in whatever pieces they are read; no byte is read for it.

    A piece that holds the next byte carries the tensor's digest on, wherever the piece begins; any other adds nothing.
    So rows that are looked at, or a second reading, change nothing, and a tensor of which a byte was not read in its
    turn has no digest. Several threads may read.

    Attributes:
        done: xxh3-128 of each tensor that was read whole, by name.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Nothing was read yet.

        Args:
            tensors: All that the files hold.
        """
        self._tensors = tensors
        self._begun: dict[str, _Begun] = {}
        self.done: dict[str, str] = {}

    def note(self, name: str, begin: int, piece: bytes | memoryview) -> None:
        """Take note of bytes that were read of a tensor.

        Args:
            name: The tensor.
            begin: Where they begin in the tensor.
            piece: The bytes.
        """
        if name in self.done:
            return
        begun = self._begun.setdefault(name, _Begun())
        with begun.lock:
            known = begun.end - begin
            if not 0 <= known < len(piece):
                return
            begun.digest.update(memoryview(piece)[known:])
            begun.end = begin + len(piece)
            if begun.end == self._tensors[name].num_bytes:
                self.done[name] = begun.digest.hexdigest()
                self._begun.pop(name, None)

    def digest(self, headers_sha256: str) -> str | None:
        """The digest of everything, or None where a byte was not read.

        Args:
            headers_sha256: Of the headers of the files, with the files' names.
        """
        nothing = xxhash.xxh3_128_hexdigest(b"")
        empty = {name: nothing for name, info in self._tensors.items() if not info.num_bytes}
        found = empty | self.done
        return content_digest(headers_sha256, found) if found.keys() == self._tensors.keys() else None
