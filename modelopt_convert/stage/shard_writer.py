"""Write one safetensors file: header first, exact size, tensor by tensor, each with its digest. No torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from modelopt_convert.checkpoint.header import METADATA, TensorSpec, build_header
from modelopt_convert.run.errors import InternalError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.locks import file_system_of

# File systems in which files can share blocks. Elsewhere a copy by the kernel costs more than to write what the digest
# has just brought into a core's cache: see docs/performance.md.
SHARING_FILE_SYSTEMS = frozenset({"xfs", "btrfs"})
_WRITEBACK_BYTES = 8 << 20  # large enough for the disk to write in one go


class ShardWriter:
    """A shard being written; a context manager. Bytes equal ``safetensors.torch.save_file`` on the same tensors.

    Attributes:
        layout: The tensors in file order: write in this order and the disk sees one sequential stream.
        digests: xxh3-128 of each tensor's bytes, by name, as they are written.
        durable: Whether fsync worked; False where the file system has none.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str] = METADATA,
        *,
        mode: int | None = None,
    ) -> None:
        """Create the file at its exact size and write its header.

        Args:
            path: The file.
            specs: Its tensors.
            metadata: Its header's.
            mode: Its permissions; None for what the umask leaves.
        """
        head, placed, self.num_bytes = build_header(specs, metadata)
        self.path = path
        self.layout = tuple(spec for spec, _ in placed)
        self.digests: dict[str, str] = {}
        self.durable = True
        self._offsets = {spec.name: offset for spec, offset in placed}
        self._sizes = {spec.name: spec.num_bytes for spec, _ in placed}
        self._shares = shares_blocks(path.parent)
        self._fd = fsops.create_file(path, mode)
        try:
            fsops.preallocate(self._fd, self.num_bytes)
            fsops.write_all(self._fd, head, 0)
        except BaseException:
            fsops.close(self._fd)
            raise

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Require every tensor, fsync, close. After an error: only close, the stage is thrown away."""
        try:
            if error is None:
                missing = self._offsets.keys() - self.digests.keys()
                if missing:
                    raise InternalError(
                        f"{self.path.name}: {len(missing)} tensors were not written, {min(missing)!r} first",
                        code="internal.shard_incomplete",
                    )
                self.durable = fsops.sync(self._fd)
        finally:
            fsops.close(self._fd)

    def write(self, name: str, chunks: Iterable[bytes | memoryview], extent: tuple[int, int] | None = None) -> None:
        """Write one tensor from consecutive pieces of its bytes.

        Args:
            name: The tensor's name.
            chunks: The tensor's bytes, in pieces.
            extent: Descriptor and offset of the same bytes in an input, if an input holds them. Where that is faster,
                the kernel copies from there, and the pieces are for the digest alone.

        Raises:
            InternalError: Unknown name, second write, or more or fewer bytes than planned.
        """
        if name not in self._offsets or name in self.digests:
            raise InternalError(f"{name!r} is not planned or written twice", code="internal.shard_write")
        planned = self._sizes[name]
        digest, came = write_run(self._fd, self._offsets[name], planned, chunks, extent if self._shares else None)
        if came != planned:
            raise InternalError(
                f"{name!r}: {planned} bytes were planned, {came} came",
                code="internal.shard_write",
            )
        self.digests[name] = digest


def shares_blocks(folder: Path) -> bool:
    """Whether a copy by the kernel is worth it there: files in the folder can share blocks."""
    return file_system_of(folder) in SHARING_FILE_SYSTEMS


def write_run(
    fd: int, offset: int, num_bytes: int, chunks: Iterable[bytes | memoryview], extent: tuple[int, int] | None
) -> tuple[str, int]:
    """Write consecutive pieces, and have the disk begin with them.

    Args:
        fd: The file.
        offset: Where the first byte goes.
        num_bytes: How many are expected; what goes beyond is not written.
        chunks: The bytes, in pieces.
        extent: Descriptor and offset of the same bytes in an input, from where the kernel copies what it can; or None.

    Returns:
        xxh3-128 of the bytes, and how many came.
    """
    begun = offset  # the disk was told to write up to here
    copied = range(0) if extent is None else fsops.copy_blocks(*extent, fd, offset, num_bytes)
    came, digest = 0, xxhash.xxh3_128()
    for piece in chunks:
        chunk = memoryview(piece)
        came += chunk.nbytes  # len() counts elements
        if came > num_bytes:
            break
        digest.update(chunk)
        at = came - chunk.nbytes
        for begin, end in ((0, copied.start - at), (max(0, copied.stop - at), chunk.nbytes)):
            if begin < min(end, chunk.nbytes):
                fsops.write_all(fd, chunk[begin:end], offset + begin)
        offset += chunk.nbytes
        if offset - begun >= _WRITEBACK_BYTES:
            fsops.start_writeback(fd, begun, offset - begun)
            begun = offset
    return digest.hexdigest(), came
