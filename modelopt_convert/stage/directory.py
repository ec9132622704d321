"""Put a new checkpoint in place so that OUT is at every moment either what it was or the whole new one. No torch.

The steps are those of docs/output.md: refuse, stage beside OUT, look around, recover, write, sync, swap, sync, and only
then remove the old tree. Every change to the disk goes through ``fsops``.
"""

import contextlib
import errno
import os
import secrets
import shlex
import signal
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

from modelopt_convert.checkpoint.header import METADATA, TensorSpec
from modelopt_convert.run.boundary import storage_error
from modelopt_convert.run.errors import OutputRefusedError, StorageError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.locks import LOCKING_FILE_SYSTEMS, file_system_of, try_lock
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed, foreign_entry
from modelopt_convert.stage.shard_writer import ShardWriter

_REMOVALS = 100  # tries at a tree that another run is removing too
_SWEPT = " (until the next run to this output, which sweeps it)"
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS})


@dataclass(frozen=True, slots=True)
class Published:
    """How the new checkpoint came into place.

    Attributes:
        method: ``rename`` (OUT was absent), ``exchange``, or ``two-renames``.
        durable: False where the file system has no fsync.
        warnings: What could not be cleaned up.
    """

    method: Literal["rename", "exchange", "two-renames"]
    durable: bool
    warnings: tuple[str, ...]


class StagingDir:
    """A folder beside OUT in which the new checkpoint is built; a context manager.

    The folder is gone afterwards, unless ``publish`` was called, or the swap was refused after all checks had passed.
    """

    def __init__(self, output: Path, inputs: Sequence[Path], *, overwrite: bool, need_bytes: int) -> None:
        """Nothing is touched yet; see ``__enter__``."""
        self.output = canonical_output(output)
        self.published: Published | None = None
        self._inputs = tuple(inputs)
        self._overwrite = overwrite
        self._need_bytes = need_bytes
        self._prefix = f".{self.output.name}.mopt-"
        self.path = self.output.parent / self._prefix  # the stage; named in __enter__, this name is never made
        self._lock: int | None = None
        self._replaced: int | None = None  # the checked OUT, held open so that no other folder gets its inode
        self._made = False
        self._folders: list[Path] = []
        self._warnings: list[str] = []
        self._durable = True
        self._done = False

    def __enter__(self) -> Self:
        """Stage, look around, recover, check the space.

        Raises:
            OutputRefusedError: ``output.busy`` if another run holds OUT, or OUT is refused after recovery.
            StorageError: No space, or the disk failed.
        """
        with _storage_errors(self.output.parent):
            try:
                self._make_stage()
                self._sweep_dead_stages()
                self._recover()
                check_output_allowed(self.output, self._inputs, overwrite=self._overwrite)
                if self.output.exists():
                    self._replaced = os.open(self.output, os.O_PATH | os.O_NOFOLLOW)
                self.check_space(self._need_bytes)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the stage unless it was published or kept; an OSError of a write becomes a StorageError."""
        if not self._done:
            self._discard()
        self._unlock()
        if isinstance(error, OSError):
            raise storage_error(error, self.output.parent) from error

    def add_folder(self, name: str) -> None:
        """Make a folder in the stage."""
        path = self.path / name
        fsops.make_dir(path, 0o777)
        self._folders.append(path)

    def shard(self, name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str] = METADATA) -> ShardWriter:
        """Begin a shard in the stage; the result is a context manager."""
        return ShardWriter(self.path / name, specs, metadata)

    def finish_shard(self, *, durable: bool) -> None:
        """Note whether the shard is on disk."""
        self._durable = self._durable and durable

    def write_file(self, name: str, data: bytes) -> None:
        """Write and sync one small file."""
        fd = fsops.create_file(self.path / name)
        try:
            fsops.write_all(fd, data, 0)
            self._durable = fsops.sync(fd) and self._durable
        finally:
            fsops.close(fd)

    def publish(self) -> Published:
        """Sync the stage, swap it with OUT, sync the parent, remove the old tree.

        SIGINT and SIGTERM are held meanwhile: the run ends with the new checkpoint or with the old one.

        Raises:
            StorageError: OUT changed since it was checked, or the swap was refused (``kept_at`` names the finished
                checkpoint); or the parent's fsync failed (``published`` is true, the old tree is kept).
        """
        with _storage_errors(self.output.parent), _signals_held():
            replaces = self.output.exists()
            inherited = self.path.stat().st_mode & stat.S_ISGID  # from a setgid parent
            mode = self.output.stat().st_mode & 0o7777 if replaces else 0o777 & ~_umask() | inherited
            fsops.set_mode(self.path, mode)
            for folder in (*self._folders, self.path):
                self._durable = fsops.sync_dir(folder) and self._durable
            try:
                check_output_allowed(self.output, self._inputs, overwrite=self._overwrite)
            except OutputRefusedError as error:
                self._keep_stage(error.message, error)
            if self._changed_hands():
                self._keep_stage("somebody else put another checkpoint there meanwhile", None)
            replaces = self.output.exists()
            method, old = self._swap(replaces)
            self._done = True
            self._sync_after_swap(old)
            self.published = Published(method, self._durable, (*self._warnings, *self._remove_old(old)))
            return self.published

    def _make_stage(self) -> None:
        while self._lock is None:  # None again only if another run swept the stage before it was locked
            path = self.output.parent / f"{self._prefix}stage-{secrets.token_hex(4)}"
            fsops.make_dir(path, 0o700)
            self.path, self._made = path, True
            self._lock = try_lock(path)

    def _sweep_dead_stages(self) -> None:
        for other in self._left_by_others("stage"):
            if file_system_of(self.output.parent) not in LOCKING_FILE_SYSTEMS:
                raise OutputRefusedError(
                    f"{other}: left by another run, and file locks prove nothing on this file system",
                    code="output.busy",
                    path=str(other),
                    hint=f"if no mopt is running on any host: rm -r {shlex.quote(str(other))}",
                )
            lock = try_lock(other)
            if lock is None:
                if not other.exists():  # its owner finished between the listing and the lock
                    continue
                raise OutputRefusedError(
                    f"{self.output}: another mopt is writing it (its stage is {other.name})",
                    code="output.busy",
                    path=str(self.output),
                    hint="wait for it to finish, or give another --output",
                )
            try:
                self._sweep(other)
            finally:
                os.close(lock)

    def _left_by_others(self, kind: Literal["stage", "old"]) -> list[Path]:
        """What other runs to this output left; mopt makes folders, so a link or file of such a name is not mopt's."""
        # glob would take a folder that may not be listed for an empty one.
        names = sorted(name for name in os.listdir(self.output.parent) if name.startswith(f"{self._prefix}{kind}-"))
        found = [self.output.parent / name for name in names]
        return [path for path in found if path != self.path and path.is_dir() and not path.is_symlink()]

    def _recover(self) -> None:
        """Roll back a two-rename swap that was cut between its renames; remove what a finished one left."""
        for old in self._left_by_others("old"):
            if os.path.lexists(self.output):
                self._sweep(old)
            else:
                with contextlib.suppress(FileNotFoundError):  # another run has just done it
                    fsops.rename(old, self.output)
                fsops.sync_dir(self.output.parent)

    def _sweep(self, tree: Path) -> None:
        # The tree may be the old checkpoint of a swap that was never synced: removing it before the swap is on disk
        # could lose both in a power cut.
        fsops.sync_dir(self.output.parent)
        if kept := self._remove(tree):
            self._warnings.append(kept)

    def _remove(self, tree: Path) -> str | None:
        """Remove a tree that mopt made or replaced; keep the tree and say so if somebody put a file into it.

        Another run may be removing the same tree: what vanishes meanwhile is no failure.
        """
        for attempt in range(_REMOVALS):
            if not os.path.lexists(tree):
                break
            try:
                if stranger := foreign_entry(tree):
                    kept = self._kept_name()
                    fsops.rename(tree, kept)
                    return f"the old checkpoint was kept in {kept}: it {stranger}"
                fsops.remove_tree(tree)
            except FileNotFoundError:
                if attempt == _REMOVALS - 1:
                    raise
        return None

    def _kept_name(self) -> Path:
        return self.output.parent / f"{self.output.name}.mopt-kept-{secrets.token_hex(4)}"

    def _changed_hands(self) -> bool:
        """Whether OUT is another folder than the one that the user consented to replace, even if it is a checkpoint."""
        if not self.output.exists():
            return False
        now = self.output.stat()
        then = None if self._replaced is None else os.fstat(self._replaced)
        return then is None or (then.st_dev, then.st_ino) != (now.st_dev, now.st_ino)

    def check_space(self, num_bytes: int) -> None:
        """Refuse if so many bytes do not fit.

        Raises:
            StorageError: ``storage.no_space``.
        """
        status = os.statvfs(self.output.parent)
        free = status.f_bavail * status.f_frsize
        if free < num_bytes:
            raise StorageError(
                f"{self.output.parent}: {num_bytes} bytes are needed, {free} are free",
                code="storage.no_space",
                path=str(self.output.parent),
                hint="free some space, or give an --output on another disk; an old OUT stands until the new is whole",
            )

    def _swap(self, replaces: bool) -> tuple[Literal["rename", "exchange", "two-renames"], Path | None]:
        try:
            if not replaces:
                try:
                    fsops.rename_noreplace(self.path, self.output)
                except OSError as error:
                    if error.errno not in _NO_EXCHANGE:
                        raise
                    if os.path.lexists(self.output):
                        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.output)) from None
                    fsops.rename(self.path, self.output)
                return "rename", None
            try:
                fsops.exchange(self.path, self.output)
            except OSError as error:
                if error.errno not in _NO_EXCHANGE:
                    raise
                return "two-renames", self._two_renames()
            return "exchange", self.path
        except OSError as error:
            self._keep_stage(error.strerror or str(error), error)

    def _two_renames(self) -> Path:
        old = self.output.parent / f"{self._prefix}old-{secrets.token_hex(4)}"
        # The old tree of the last run must be gone for good. Else a power cut now could leave that tree, half removed,
        # beside this one, and the next run would not know which of the two to put back.
        self._durable = fsops.sync_dir(self.output.parent) and self._durable
        fsops.rename(self.output, old)
        try:
            fsops.rename(self.path, self.output)
        except OSError as error:
            try:
                fsops.rename(old, self.output)
            except OSError:
                left = f"{error.strerror}; the old one could not be put back, the next run will: it is in {old}"
                raise OSError(error.errno, left, error.filename) from error
            raise
        return old

    def _keep_stage(self, why: str, error: Exception | None) -> NoReturn:
        """Give the stage a name that the user can see: a refused swap is no reason to throw checked work away."""
        kept = self._kept_name()
        try:
            fsops.rename(self.path, kept)
            fsops.sync_dir(self.output.parent)
        except OSError:
            if not kept.exists():  # nothing can be renamed here, so say where it is
                kept = self.path
        self._done = True
        target = self.output.parent / f"{self.output.name}.new"
        raise StorageError(
            f"{self.output}: the finished checkpoint could not take its place: {why}",
            code="storage.swap_refused",
            path=str(self.output),
            hint=f"it is whole in {kept}{_SWEPT if kept == self.path else ''}; move it yourself: "
            f"mv {shlex.quote(str(kept))} {shlex.quote(str(target))}",
            kept_at=str(kept),
        ) from error

    def _sync_after_swap(self, old: Path | None) -> None:
        try:
            self._durable = fsops.sync_dir(self.output.parent) and self._durable
        except OSError as error:
            left = f"; the old checkpoint is kept in {old}" if old else ""
            raise StorageError(
                f"{self.output}: the new checkpoint is in place, but not known to be on disk: {error.strerror}{left}",
                code="storage.sync_after_swap",
                path=str(self.output),
                hint="check the disk; run `sync`, then `mopt` again or verify the checkpoint",
                published=True,
            ) from error

    def _remove_old(self, old: Path | None) -> tuple[str, ...]:
        if old is None:
            return ()
        try:
            kept = self._remove(old)
        except OSError as error:
            return (f"the old checkpoint in {old} could not be removed: {error.strerror}",)
        return (kept,) if kept else ()

    def _discard(self) -> None:
        if not self._made:
            return
        with contextlib.suppress(OSError):  # the next run sweeps what cannot be removed now
            fsops.remove_tree(self.path)
        self._unlock()

    def _unlock(self) -> None:
        for fd in (self._lock, self._replaced):
            if fd is not None:
                os.close(fd)
        self._lock = self._replaced = None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Note SIGINT and SIGTERM, and let them act only at the end.

    A signal mask would not do: a mask belongs to one thread, and torch's threads would take the signal for the process.
    Handlers run in the main thread alone, so in other threads there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda caught, _: noted.append(caught)) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    # After an error no signal acts: the run ends anyway, and what the error says of the disk matters more.
    if noted:
        signal.raise_signal(noted[0])


@contextlib.contextmanager
def _storage_errors(where: Path) -> Iterator[None]:
    """Turn what the kernel says into one clear line with the path and the errno."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error
