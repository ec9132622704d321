"""A file on the Hub that is read like one on disk: each byte is fetched at most once, and only if it is asked for.

What was fetched lies in a file without a name beside the Hub's cache. That file takes disk, not memory, and is gone
with the process, however the process ends.
"""

import bisect
import os
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from typing import IO

from modelopt_convert.checkpoint.hub.answers import HubFile
from modelopt_convert.checkpoint.hub.client import hub_errors
from modelopt_convert.checkpoint.hub.range_source import Outage, RangeSource
from modelopt_convert.checkpoint.hub.ranges import Range, bridged, pieces, total, union, without
from modelopt_convert.run.errors import RemoteError, StorageError

PIECE_BYTES = 16 << 20
# Gaps between ranges are fetched too, as long as they add less than a twenty-fifth: a request costs as much time.
_SPARE = 25


class RemoteFile:
    """A file of a repo. Whoever opens it again finds what was fetched before.

    Attributes:
        where: Its name in messages.
        num_bytes: Its size.
        fetched: Bytes that came over the network so far.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        path: str,
        file: HubFile,
        pool: Executor,
        outage: Outage,
        *,
        where: str,
        spool: IO[bytes] | None = None,
    ) -> None:
        """Ask nothing of the Hub yet; the threads of ``pool`` will fetch.

        Args:
            repo_id: ORGANIZATION/NAME.
            commit: The commit that is read.
            path: The file's path in the repo.
            file: What the Hub lists of it.
            pool: Threads.
            outage: That of the repo.
            where: The file's name in messages.
            spool: Takes what is fetched; None for a file without a name.

        Raises:
            StorageError: ``storage.spool``: the file for what is fetched cannot be made.
        """
        self.where = where
        self.num_bytes = file.num_bytes
        self.fetched = 0
        self._repo_id = repo_id
        self._source = RangeSource(repo_id, commit, path, file, outage)
        self._pool = pool
        self._lock = threading.Lock()
        self._counting = threading.Lock()  # apart: close() holds _lock while it waits for the threads that fetch
        self._stopped = threading.Event()
        self._taken: list[Range] = []  # sorted, disjoint; pieces that touch are not joined: each has a future
        self._futures: dict[Range, Future[bool]] = {}  # of every piece in _taken
        self._spool = spool if spool is not None else _spool()
        self._users = 0

    @property
    def requests(self) -> int:
        """How many ranges were asked for."""
        return self._source.requests

    def open(self) -> "RemoteFile":
        """The file itself, to be closed as often as it is opened."""
        with self._lock:
            self._users += 1
            self._stopped.clear()
        return self

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Begin to fetch what is not there yet, in the order of the file.

        Raises:
            RemoteError: ``hub.disk_full``.
        """
        with self._lock:
            asked = union(ranges)
            if not asked:
                return
            near = self._near(asked[0][0], asked[-1][1])
            missing = without(asked, near)
            if not missing:
                return
            wanted = without(bridged(missing, total(missing) // _SPARE), near)
            self._check_room(total(wanted))
            for piece in pieces(wanted, PIECE_BYTES):
                # In this order: a signal may act in between, and close() asks for the future of all that is taken.
                self._futures[piece] = self._pool.submit(self._fetch, *piece)
                bisect.insort(self._taken, piece)

    def unfetched(self, ranges: Iterable[Range]) -> int:
        """Bytes of ``ranges`` that are not there yet."""
        return total(without(union(ranges), self._taken))

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes from ``offset``, once they are there.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        self.wait(offset, offset + num_bytes)
        found = os.pread(self._spool.fileno(), num_bytes, offset)
        assert len(found) == num_bytes
        return found

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset``, once they are there.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        self.wait(offset, offset + len(target))
        count = os.preadv(self._spool.fileno(), [target], offset)
        assert count == len(target)

    def fileno(self) -> None:
        """None: the file is not on disk under a name of its own."""

    def wait(self, offset: int, end: int) -> None:
        """Return once the bytes from ``offset`` to ``end`` are there.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        self.prefetch([(offset, end)])
        with self._lock:
            needed = [self._futures[piece] for piece in self._near(offset, end)]
        for future in needed:
            future.result()

    def check_unchanged(self) -> None:
        """Nothing: a commit does not change, and every link's etag was compared."""

    def close(self) -> None:
        """Stop fetching when the last user closes the file; what was fetched stays."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            self._stopped.set()
            found = [(piece, self._futures[piece]) for piece in self._taken]
            whole = {
                piece: future
                for piece, future in found
                if not future.cancel() and future.exception() is None and future.result()
            }
            self._taken, self._futures = list(whole), whole

    def _near(self, begin: int, end: int) -> list[Range]:
        """All pieces that may hold bytes of [begin, end), found without a look at the thousands of others."""
        first = max(0, bisect.bisect(self._taken, (begin, self.num_bytes)) - 1)
        return self._taken[first : bisect.bisect_left(self._taken, (end, 0))]

    def _fetch(self, begin: int, end: int) -> bool:
        """Fetch a piece; whether all of the piece came, and not only what came before the stop."""
        with hub_errors(self._repo_id):
            self._source.fetch(begin, end, self._put, self._stopped)
        return not self._stopped.is_set()

    def _put(self, chunk: bytes, offset: int) -> None:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self._spool.fileno(), view, offset)
            view, offset = view[written:], offset + written
        with self._counting:
            self.fetched += len(chunk)

    def _check_room(self, num_bytes: int) -> None:
        room = os.fstatvfs(self._spool.fileno())
        free = room.f_bavail * room.f_frsize
        if num_bytes > free:
            raise RemoteError(
                f"{self.where}: {num_bytes} bytes are to be fetched, {free} are free beside the Hub's cache",
                code="hub.disk_full",
                path=self.where,
                hint="free some space, or point HF_HOME at a larger disk",
            )


def _spool() -> IO[bytes]:
    """A file without a name, on the disk of the Hub's cache."""
    from huggingface_hub import cached_assets_path

    try:
        folder = cached_assets_path("mopt", namespace="ranges")
        return tempfile.TemporaryFile(dir=folder)
    except (OSError, ValueError) as error:  # a file in place of a folder is a ValueError to the client
        raise StorageError(
            f"what was fetched cannot be stored: {error}",
            code="storage.spool",
            hint="point HF_HOME at a folder that can be written",
        ) from error
