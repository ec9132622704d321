"""Open a checkpoint, folder or single file, near or far: check headers and index, read tensor bytes. No torch."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modelopt_convert.checkpoint.config import (
    BESIDE,
    CONFIG,
    GIVEN,
    HEADER,
    MAX_CONFIG_BYTES,
    OWN,
    config_beside,
    config_in_header,
    parse_config,
)
from modelopt_convert.checkpoint.content import CONTENT, Content
from modelopt_convert.checkpoint.header import PREFIX_BYTES, TensorInfo, parse_header, read_header_length
from modelopt_convert.checkpoint.index import SHOWN_CHARS, check_index, cut, is_shard_name
from modelopt_convert.checkpoint.location import Location, OpenFile, check_name, identify, open_file, read_small
from modelopt_convert.checkpoint.recipe import recipe_of
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.checkpoint.variants import choose_weights, is_index
from modelopt_convert.run.errors import InputError

CHUNK_BYTES = 8 << 20
MAX_INDEX_BYTES = 100_000_000
# How many bytes of a tensor may be in memory at a time. A tensor that is read whole is looked at in several copies;
# the block scales of a weight of 4e9 elements have as many bytes as the first limit. No row, and no weight that is
# multiplied, is larger than the second.
MAX_WHOLE_BYTES = 256 << 20
MAX_READ_BYTES = 1 << 30
INDEX_SUFFIX = ".safetensors.index.json"

# What is read of a tensor: the tensor's name, the first byte, and the number of bytes.
Reading = tuple[str, int, int]


class CheckpointReader:
    """A checkpoint, opened and checked; a context manager that holds its files open.

    Attributes:
        path: What was opened: a folder, or one file.
        folder: The folder that the files lie in, also that of a single file.
        is_alone: Whether one file was opened, and nothing is known of its folder.
        tensors: Every tensor by name, as it is presented.
        stored: Every tensor by name, as the headers have it.
        metadata: Header metadata by file.
        config: config.json as an object, or what stands in for it; empty where there is none.
        config_from: Where the config is from, one of the words of ``checkpoint.config``; None where there is none.
        indexes: The name of the index that is followed, at most one.
        skipped: Names in the folder that are neither read nor copied.
        left_aside: Those among them that are weights or an index: of a variant, or not named by the index.
        content: Digests what is read, once ``digest_content`` was called.
    """

    def __init__(
        self,
        path: Location,
        *,
        need_config: bool = True,
        variant: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a folder, or one .safetensors file: headers, index and config are cross-checked, no tensor is read.

        Args:
            path: The folder or file.
            need_config: Whether a folder without config.json is an error, if no ``config`` is given.
            variant: The variant of the weights that is read; None for the plain ones, or the only variant.
            config: Stands in for a config.json: of a folder that has none, or of a file whatever lies beside it.

        Raises:
            InputError: With an ``input.*``, ``header.*``, ``index.*`` or ``config.*`` code.
        """
        self.is_alone = path.is_file()
        self.path = path
        self.folder = path.parent if self.is_alone else path
        self.tensors: dict[str, TensorInfo] = {}
        self.config: dict[str, Any] = {}
        self.config_from: str | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        self.skipped: tuple[str, ...] = ()
        self.left_aside: tuple[str, ...] = ()
        self.indexes: tuple[str, ...] = ()
        self.content: Content | None = None
        self._variant = variant
        self._files: dict[str, OpenFile] = {}
        self._beside: dict[str, OpenFile] = {}
        self._headers = hashlib.sha256()
        try:
            if self.is_alone:
                small = self._open_one(path, config)
            else:
                small = self._open_folder(need_config and config is None)
                if config is not None and self.config_from is None:
                    self.config, self.config_from = dict(config), GIVEN
            self.stored, self._own_config = self.tensors, self.config
            self._has_config_file = self.config_from in (OWN, BESIDE)
            self._origin = identify(self.folder, small, self._files)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; report those that changed meanwhile, unless something else already failed."""
        try:
            if error is None:
                self.check_unchanged()
        finally:
            self._release()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        return tuple(sorted(self._files))

    @property
    def num_bytes(self) -> int:
        """Total size of the safetensors files."""
        return sum(file.num_bytes for file in self._files.values())

    @property
    def config_place(self) -> str:
        """Where the config is, for messages; what was opened, where no config.json lies there.

        A config that is lent of a base keeps what the own config.json says of quantization.
        """
        return str(self.folder / CONFIG if self._has_config_file else self.path)

    def opened(self, name: str) -> OpenFile:
        """One of the opened safetensors files, by its name."""
        return self._files[name]

    def present(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Go on with other tensors, whose bytes come from the same files.

        Args:
            tensors: By name.
        """
        self.tensors = dict(tensors)
        if self.content is not None:
            self.digest_content()

    def as_stored(self) -> "CheckpointReader":
        """The same opened files by their own headers, whatever is presented. What opened them closes them."""
        found = copy(self)
        found.tensors, found.config, found.content = self.stored, self._own_config, None
        return found

    @property
    def is_presented(self) -> bool:
        """Whether other tensors are presented than the headers have."""
        return self.tensors is not self.stored

    def take_beside(self, place: str, other: "CheckpointReader") -> None:
        """Let recipes take bytes of another checkpoint too, which stays open as long as this one is read.

        Args:
            place: What stands in front of the names of its files, see ``recipe.Elsewhere``.
            other: The other checkpoint.
        """
        self._beside |= {f"{place}/{name}": file for name, file in other._files.items()}

    def digest_content(self) -> None:
        """From now on digest what is read, so that the identity has all bytes once all were read."""
        self.content = Content(self.tensors)

    def take_content(self, name: str, digest: str) -> None:
        """Take over the digest of a tensor that was read whole in another process."""
        assert self.content is not None  # asked for here, or it would not have been taken there
        self.content.done[name] = digest

    def identity(self) -> dict[str, str]:
        """What identifies the checkpoint: digests of headers and of what was digested whole, and its origin as seen."""
        headers = self._headers.hexdigest()
        content = self.content.digest(headers) if self.content is not None else None
        return {"headers_sha256": headers, **self._origin} | ({CONTENT: content} if content is not None else {})

    def read(self, name: str, *, limit: int = MAX_WHOLE_BYTES) -> bytes:
        """All bytes of a tensor. For tensors that may be large, use ``chunks`` or ``read_range``.

        Raises:
            MoptError: ``input.too_large``: there are more bytes than ``limit``; or what ``read_range`` raises.
        """
        self._check_size(name, self.tensors[name].num_bytes, limit)
        return self.read_range(name, 0, self.tensors[name].num_bytes)

    def read_writable(self, name: str, *, limit: int = MAX_WHOLE_BYTES) -> memoryview:
        """``read`` into memory that may be written to, which a tensor can use without a copy."""
        import numpy as np

        info = self.tensors[name]
        self._check_size(name, info.num_bytes, limit)
        buffer = np.empty(info.num_bytes, np.uint8).data
        self.read_into(name, 0, buffer)
        return buffer

    def read_range(self, name: str, begin: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes of a tensor from its byte ``begin``.

        Raises:
            MoptError: ``input.too_large``, ``input.changed`` or a ``hub.*`` code: the bytes cannot be had.
            OSError: The disk failed.
        """
        self._check_size(name, num_bytes, MAX_READ_BYTES)
        info = self.tensors[name]
        found = self._read(info, begin, num_bytes)
        if self.content is not None:
            self.content.note(name, begin, found)
        return found

    def read_of(self, info: TensorInfo, begin: int, num_bytes: int) -> bytes:
        """Bytes of a tensor that comes from the files of this checkpoint, whether it is presented or not.

        Args:
            info: The tensor.
            begin: The first byte.
            num_bytes: How many.

        Raises:
            MoptError: What ``read_range`` raises.
            OSError: The disk failed.
        """
        return self._read(info, begin, num_bytes)

    def read_of_into(self, info: TensorInfo, begin: int, target: memoryview) -> None:
        """Fill ``target`` with what ``read_of`` gives: many pieces can share a buffer."""
        if info.recipe is None:
            self._files[info.file].read_into(info.start + begin, target)
        else:
            info.recipe.fill(begin, target, self._fetch)

    def read_into(self, name: str, begin: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of a tensor from its byte ``begin``.

        Raises:
            MoptError: ``input.changed`` or a ``hub.*`` code: the bytes cannot be had.
            OSError: The disk failed.
        """
        self.read_of_into(self.tensors[name], begin, target)
        if self.content is not None:
            self.content.note(name, begin, target)

    def read_rows(self, name: str, rows: Sequence[int], row_bytes: int, num_bytes: int | None = None) -> bytes:
        """Some rows of a matrix, one behind the other.

        Args:
            name: The tensor's name.
            rows: Row indices.
            row_bytes: Bytes from the beginning of one row to the beginning of the next.
            num_bytes: How many bytes of each row are wanted, from the row's first; None for all.

        Raises:
            MoptError: What ``read_range`` raises.
        """
        width = row_bytes if num_bytes is None else num_bytes
        self._check_size(name, width * len(rows), MAX_READ_BYTES)
        self.prefetch((name, row * row_bytes, width) for row in rows)
        return b"".join(self.read_range(name, row * row_bytes, width) for row in rows)

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[bytes]:
        """A tensor's bytes in pieces of at most ``chunk_bytes``."""
        total = self.tensors[name].num_bytes
        self.prefetch([(name, 0, total)])
        for begin in range(0, total, chunk_bytes):
            yield self.read_range(name, begin, min(chunk_bytes, total - begin))

    def buffered(self, name: str, chunk_bytes: int) -> Iterator[memoryview]:
        """A tensor's bytes in pieces of at most ``chunk_bytes``, in one buffer: each is good until the next is read.

        Fresh memory for every piece would cost more than the reading: the kernel has to clear it first. A bytearray
        would be cleared once more, under Python's lock.
        """
        import numpy as np

        info = self.tensors[name]
        self.prefetch([(name, 0, info.num_bytes)])
        buffer = np.empty(min(chunk_bytes, info.num_bytes), np.uint8).data
        for begin in range(0, info.num_bytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, info.num_bytes - begin)]
            self.read_into(name, begin, piece)
            yield piece

    def extent(self, name: str) -> tuple[int, int] | None:
        """Descriptor and offset of a tensor's bytes; None if the bytes lie on the Hub, or are not one stretch."""
        info = self.tensors[name]
        if info.recipe is not None:
            return None
        fd = self._files[info.file].fileno()
        return None if fd is None else (fd, info.start)

    def prefetch(self, readings: Iterable[Reading]) -> None:
        """Say what will be read soon: what lies on the Hub is then fetched together, ahead of the reader."""
        for file, ranges in self._by_file(readings).items():
            self._any(file).prefetch(ranges)

    def unfetched(self, readings: Iterable[Reading]) -> int:
        """Bytes that reading this would bring over the network."""
        return sum(self._any(file).unfetched(ranges) for file, ranges in self._by_file(readings).items())

    def traffic(self) -> tuple[int, int]:
        """Bytes and ranges that came over the network so far."""
        files = self._files.values()
        return sum(file.fetched for file in files), sum(file.requests for file in files)

    def _check_size(self, name: str, num_bytes: int, limit: int) -> None:
        """Refuse to read what is too large for memory: a file may be sparse, and a header may claim anything."""
        if num_bytes > limit:
            info = self.tensors[name]
            where = str(self.folder / info.file)
            found = f"found {num_bytes} of {info.dtype} {str(list(info.shape))[:SHOWN_CHARS]}"
            raise InputError(
                f"{where}: tensor {cut(name)}: expected at most {limit} bytes to be read at once, {found}",
                code="input.too_large",
                path=where,
                hint="no model has scales, biases or rows of this size; do not use this checkpoint",
            )

    def _by_file(self, readings: Iterable[Reading]) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for name, begin, num_bytes in readings:
            for one in recipe_of(self.tensors[name]).extents(begin, num_bytes):
                found.setdefault(one.file, []).append((one.start, one.start + one.num_bytes))
        return found

    def _read(self, info: TensorInfo, begin: int, num_bytes: int) -> bytes:
        if info.recipe is None:
            return self._files[info.file].read(info.start + begin, num_bytes)
        found = bytearray(num_bytes)
        info.recipe.fill(begin, memoryview(found), self._fetch)
        return bytes(found)

    def _fetch(self, file: str, start: int, target: memoryview) -> None:
        self._any(file).read_into(start, target)

    def _any(self, file: str) -> OpenFile:
        return self._beside[file] if file in self._beside else self._files[file]

    def check_unchanged(self) -> None:
        """Compare the files with what they were at opening.

        Raises:
            InputError: ``input.changed``.
        """
        for file in self._files.values():
            file.check_unchanged()

    def _release(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open_one(self, path: Location, given: Mapping[str, Any] | None) -> dict[str, bytes]:
        """Open one file; its config is the given one, else the header's, else the one beside the file."""
        if self._variant is not None:
            raise InputError(
                f"{path}: expected a folder with the variant {self._variant}, found one file",
                code="input.variant",
                path=str(path),
                hint="leave --variant out, or give the folder",
            )
        self._open_shard(path.name)
        if given is not None:
            self.config, self.config_from = dict(given), GIVEN
        elif (held := config_in_header(self.metadata[path.name], str(path))) is not None:
            self.config, self.config_from = held, HEADER
        elif (beside := config_beside(self.folder)) is not None:
            raw, self.config = beside
            self.config_from = BESIDE
            return {CONFIG: raw}
        return {}

    def _open_folder(self, need_config: bool) -> dict[str, bytes]:
        """Open what a folder holds; the bytes of config and index."""
        names = self._list()
        small: dict[str, bytes] = {}
        if need_config or CONFIG in names:
            raw = small[CONFIG] = read_small(self.folder / CONFIG, MAX_CONFIG_BYTES, code="config")
            self.config, self.config_from = parse_config(raw, str(self.folder / CONFIG)), OWN
        indexes = [name for name in names if is_index(name)]
        files = [name for name in names if name.endswith(".safetensors")]
        chosen = choose_weights(str(self.folder), files, indexes, self._variant)
        if chosen.listing is not None:
            weight_map = self._weight_map(chosen.listing, small)
            for shard in sorted(set(weight_map.values())):
                self._open_shard(shard)
            check_index(str(self.folder / chosen.listing), weight_map, self.tensors)
            self.indexes = (chosen.listing,)
        for file in chosen.files:
            self._open_shard(file)
        used = {CONFIG, *self.indexes, *self._files}
        self.skipped = tuple(name for name in names if name not in used)
        self.left_aside = tuple(name for name in (*files, *indexes) if name not in used)
        return small

    def _list(self) -> list[str]:
        """Names in the folder, sorted; a name that is not UTF-8 is escaped, so that it is no name of a known file."""
        if not isinstance(self.folder, Path):
            return self.folder.names()
        try:
            names = os.listdir(self.folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be listed: {error.strerror}",
                code="input.missing" if isinstance(error, FileNotFoundError) else "input.unreadable",
                path=str(self.folder),
                hint="give a folder that exists and can be read",
            ) from error
        for name in names:
            if name.endswith(".safetensors") or is_index(name):
                check_name(self.folder, name)
        return sorted(name.encode(errors="backslashreplace").decode() for name in names)

    def _weight_map(self, index: str, small: dict[str, bytes]) -> dict[str, str]:
        """What an index says, whose bytes are also put among the small files."""
        index_path = self.folder / index
        raw = small[index] = read_small(index_path, MAX_INDEX_BYTES, code="index")
        weight_map = parse_json_object(raw, code="index", path=str(index_path)).get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        if not isinstance(weight_map, dict) or not named or not all(isinstance(file, str) for file in named):
            raise InputError(
                f"{index_path}: weight_map must map tensor names to file names",
                code="index.weight_map",
                path=str(index_path),
                hint="rebuild the index, or export again",
            )
        for file in set(weight_map.values()):
            if not is_shard_name(file):
                raise InputError(
                    f"{index_path}: {cut(file)} is not the name of a .safetensors file in this folder",
                    code="index.path_escape",
                    path=str(index_path),
                    hint="an index may only name files beside it; do not use this checkpoint",
                )
        return weight_map

    def _open_shard(self, name: str) -> None:
        file = open_file(self.folder, name)
        self._files[name] = file
        where = file.where
        prefix = file.read(0, min(PREFIX_BYTES, file.num_bytes))
        length = read_header_length(prefix, file=where, file_bytes=file.num_bytes)
        raw = file.read(PREFIX_BYTES, length)
        header = parse_header(raw, file=where, file_bytes=file.num_bytes)
        self._headers.update(f"{name}\0{length}\0".encode() + raw)
        self.metadata[name] = header.metadata
        for tensor, info in header.tensors.items():
            if tensor in self.tensors:
                raise InputError(
                    f"{where}: tensor {cut(tensor)} is also in {self.tensors[tensor].file}",
                    code="index.mismatch",
                    path=where,
                    hint="two checkpoints are mixed in one folder; export again into an empty one",
                )
            self.tensors[tensor] = TensorInfo(tensor, info.dtype, info.shape, name, info.start, info.num_bytes)
