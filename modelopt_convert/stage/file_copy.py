"""Copy a file into the stage, near or far; blocks are shared where the file system can. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelopt_convert.checkpoint.location import OpenFile
from modelopt_convert.stage import fsops
from modelopt_convert.stage.shard_writer import shares_blocks, write_run

_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """What came of a copy.

    Attributes:
        digest: xxh3-128 of the bytes that were read and written.
        durable: Whether fsync worked; False where the file system has none.
    """

    digest: str
    durable: bool


def copy_file(source: OpenFile, path: Path, mode: int | None, advance: Callable[[int], None]) -> CopiedFile:
    """Copy and sync one file.

    Args:
        source: The opened file.
        path: Where the copy shall stand; nothing does yet.
        mode: Its permissions; None for what the umask leaves.
        advance: Called with the number of bytes just copied.

    Raises:
        MoptError: The source changed, or its storage failed.
        OSError: A disk failed.
    """

    def pieces() -> Iterator[bytes]:
        source.prefetch([(0, source.num_bytes)])
        for begin in range(0, source.num_bytes, _READ_BYTES):
            piece = source.read(begin, min(_READ_BYTES, source.num_bytes - begin))
            advance(len(piece))
            yield piece

    near = source.fileno()
    extent = (near, 0) if near is not None and shares_blocks(path.parent) else None
    fd = fsops.create_file(path, mode)
    try:
        fsops.preallocate(fd, source.num_bytes)
        digest, _ = write_run(fd, 0, source.num_bytes, pieces(), extent)
        return CopiedFile(digest, fsops.sync(fd))
    finally:
        fsops.close(fd)
