"""Put a new checkpoint in place so that OUT is at every moment either what it was or the whole new one. No torch.

The steps are those of docs/output.md: refuse, stage beside OUT, look around, recover, write, sync, swap, sync, and only
then remove the old tree. Every change to the disk goes through ``fsops``.
"""

import contextlib
import os
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from modelopt_convert.checkpoint.header import METADATA, TensorSpec
from modelopt_convert.run.boundary import foreseen
from modelopt_convert.run.errors import MoptError, OutputRefusedError, StorageError
from modelopt_convert.run.signals import signals_held
from modelopt_convert.stage import fsops
from modelopt_convert.stage.leftovers import Marker, beside, marker_of
from modelopt_convert.stage.locks import try_lock
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed, check_place
from modelopt_convert.stage.ownership import Standing, changed, in_words, look, standing_at
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.stage.swap import Method, swap, undo
from modelopt_convert.stage.sweep import Sweep, said

_SWEPT = " (until the next run to this output, which sweeps it)"


@dataclass(frozen=True, slots=True)
class Published:
    """How the new checkpoint came into place.

    Attributes:
        method: ``rename`` (OUT was absent), ``exchange``, or ``two-renames``.
        durable: False where the file system has no fsync.
        warnings: What could not be cleaned up.
        foreign: What went with the old checkpoint and was not known to be its own.
    """

    method: Method
    durable: bool
    warnings: tuple[str, ...]
    foreign: tuple[str, ...] = ()


class StagingDir:
    """A folder beside OUT in which the new checkpoint is built; a context manager.

    The folder is gone afterwards, unless ``publish`` was called, or the swap was refused after all checks had passed.
    """

    def __init__(
        self,
        output: Path,
        inputs: Sequence[Path],
        *,
        overwrite: bool,
        need_bytes: int,
        overwrite_foreign: bool | None = False,
        copies: Iterable[str] = (),
    ) -> None:
        """Nothing is touched yet; see ``__enter__``.

        Args:
            output: OUT.
            inputs: What is read.
            overwrite: See ``check_output_allowed``.
            need_bytes: Room that must be free.
            overwrite_foreign: See ``check_output_allowed``.
            copies: Paths in the stage of files whose names mopt does not choose.
        """
        self.output = canonical_output(output)
        self.published: Published | None = None
        self._inputs = tuple(inputs)
        self._check_output = partial(
            check_output_allowed, self.output, self._inputs, overwrite=overwrite, overwrite_foreign=overwrite_foreign
        )
        self._need_bytes = need_bytes
        self._copies = tuple(copies)
        self._number = ""  # of this run, in the names of all that it may leave
        self.path = beside(self.output, "stage", self._number)  # named in __enter__, this name is never made
        self._standing: Standing | None = None
        self._marker: Marker | None = None  # once it is on disk
        self._lock: int | None = None
        self._replaced: int | None = None  # the checked OUT, held open so that no other folder gets its inode
        self._made = False
        self._folders: list[Path] = []
        self._written: dict[str, tuple[int, ...]] = {}  # every file, as it was when it was finished
        self._beside = Sweep(self.output)
        self._durable = True
        self._done = False

    def __enter__(self) -> Self:
        """Stage, look around, recover, check the space.

        Raises:
            OutputRefusedError: ``output.busy`` if another run holds OUT, or OUT is refused after recovery.
            StorageError: No space, or the disk failed.
        """
        with self._named_errors():
            try:
                self._make_stage()
                self._beside.sweep_stages(self.path)
                self._beside.recover()
                self._beside.sweep_markers()
                self._standing = self._check_output()
                if self._standing is not None:
                    self._replaced = os.open(self.output, os.O_PATH | os.O_NOFOLLOW)
                self.check_space(self._need_bytes)
                self._mark()
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the stage unless it was published or kept; an OSError becomes an input's error, or the storage's."""
        if isinstance(error, FileExistsError) and error.filename is not None and self._is_mine(self.path):
            place = Path(error.filename)
            if place.is_relative_to(self.path) and place.relative_to(self.path).as_posix() not in self._written:
                try:
                    self._refuse_taken(place, error)
                finally:
                    self._unlock()
        if not self._done and (kept := self._discard()) is not None and isinstance(error, MoptError):
            error.hint = f"{error.hint}; {kept}"
        self._unlock()
        if isinstance(error, OSError):
            with self._named_errors():
                raise error

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Make of an OSError an input's error or the storage's, by the file that it names."""
        try:
            yield
        except OSError as error:
            known = foreseen(error, self._inputs, str(self.output.parent))
            raise known or error from error

    def add_folder(self, name: str) -> None:
        """Make a folder in the stage."""
        path = self.path / name
        fsops.make_dir(path, 0o777)
        self._folders.append(path)

    def shard(self, name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str] = METADATA) -> ShardWriter:
        """Begin a shard in the stage; the result is a context manager."""
        return ShardWriter(self.path / name, specs, metadata, mode=self.mode_for(name))

    def mode_for(self, name: str) -> int | None:
        """The permissions that a file takes over from the old checkpoint; None for what the umask leaves."""
        return self._standing.mode_for(name) if self._standing is not None else None

    def written(self, *names: str, durable: bool) -> None:
        """Note files that stand finished in the stage, and whether they are on disk."""
        self._written |= {name: _state(self.path / name) for name in names}
        self._durable = self._durable and durable

    def _folder_mode(self, folder: Path) -> int | None:
        old = self._standing.tree.get(folder.relative_to(self.path).as_posix()) if self._standing is not None else None
        if old is None or old.kind != stat.S_IFDIR or old.mode == stat.S_IMODE(folder.stat().st_mode):
            return None
        return old.mode

    def write_file(self, name: str, data: bytes) -> None:
        """Write and sync one small file."""
        fd = fsops.create_file(self.path / name, self.mode_for(name))
        try:
            fsops.write_all(fd, data, 0)
            self._durable = fsops.sync(fd) and self._durable
        finally:
            fsops.close(fd)
        self._written[name] = _state(self.path / name)

    def remove_folder(self, name: str) -> None:
        """Take a folder out of the stage again, with the finished files in it.

        Raises:
            StorageError: ``storage.swap_refused``: the stage holds what mopt did not write; nothing was removed.
        """
        with self._named_errors():
            self._check_stage()
            mine = [one for one in self._written if one.startswith(f"{name}/")]
            for one in mine:
                fsops.remove_file(self.path / one)
                del self._written[one]
            fsops.remove_dir(self.path / name)
            self._folders.remove(self.path / name)

    def publish(self) -> Published:
        """Sync the stage, swap it with OUT, sync the parent, remove the old tree.

        Signals are held meanwhile: the run ends with the new checkpoint or with the old one.

        Raises:
            StorageError: OUT changed since it was checked, or the swap was refused (``kept_at`` names the finished
                checkpoint); or the parent's fsync failed (``published`` is true, the old tree is kept).
        """
        with self._named_errors(), signals_held():
            self._check_stage()  # before modes are changed by its name
            replaces = self.output.exists()
            inherited = self.path.stat().st_mode & stat.S_ISGID  # from a setgid parent
            mode = self.output.stat().st_mode & 0o7777 if replaces else 0o777 & ~_umask() | inherited
            fsops.set_mode(self.path, mode)
            for folder in self._folders:
                if (old_mode := self._folder_mode(folder)) is not None:
                    fsops.set_mode(folder, old_mode)
            for folder in (*self._folders, self.path):
                self._durable = fsops.sync_dir(folder) and self._durable
            try:
                check_place(self.output, self._inputs)
            except OutputRefusedError as error:
                self._keep_stage(error.message, error)
            if self._changed_hands():
                self._keep_stage("somebody else put another checkpoint there meanwhile", None)
            self._check_stage()
            replaces = self.output.exists()
            if replaces and self._standing is not None and (found := changed(self._standing, standing_at(self.output))):
                self._keep_stage(f"it is not as it was when it was checked: {in_words(found)}", None)
            method, old = self._swap(replaces)
            self._done = True
            self._sync_after_swap(old)
            warned = (*self._late(), *self._remove_old(old))
            foreign = self._standing.foreign if old is not None and self._standing is not None else ()
            self.published = Published(method, self._durable, (*self._beside.warnings, *warned), foreign)
            return self.published

    def _make_stage(self) -> None:
        while self._lock is None:  # None again only if another run swept the stage before it was locked
            self._number = secrets.token_hex(4)
            path = beside(self.output, "stage", self._number)
            with signals_held():  # what is made is known to be
                fsops.make_dir(path, 0o700)
                self.path, self._made = path, True
            self._lock = try_lock(path)

    def _mark(self) -> None:
        """Note, before anything is in the stage, that it is mopt's, and what it is to replace."""
        marker = marker_of(self._standing, self.output, self._copies, self._number)
        with signals_held():
            fd = fsops.create_file(beside(self.output, "mark", self._number))
            self._marker = marker
            try:
                fsops.write_all(fd, marker.to_bytes(), 0)
                if self._copies:  # nobody but the marker knows their names
                    self._durable = fsops.sync(fd) and self._durable
            finally:
                fsops.close(fd)
        # A stage that a power cut left without its marker would be nobody's for ever; its name is enough for that. And
        # what was swept must be gone for good before a swap in two: else a power cut could leave two old trees.
        self._durable = fsops.sync_dir(self.output.parent) and self._durable

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
                hint="free some space, or give an OUT on another disk; an old OUT stands until the new is whole",
            )

    def _swap(self, replaces: bool) -> tuple[Method, Path | None]:
        """Swap, and look whether it was the stage that came to OUT: its name is nobody's to give, and may be taken."""
        try:
            method, old = swap(self.path, self.output, beside(self.output, "old", self._number), replaces=replaces)
        except OSError as error:
            self._keep_stage(error.strerror or str(error), error)
        if self._is_mine(self.output):
            return method, old
        where = ""
        try:
            undo(method, self.path, self.output, old)
        except OSError as error:
            where = f"; {self.output} could not be put back ({error.strerror}): it is in {old}" if old else ""
        self._refuse_other_stage(where)

    def _check_stage(self) -> None:
        """Refuse to publish what mopt did not write.

        Raises:
            StorageError: ``storage.swap_refused``.
        """
        if not self._is_mine(self.path):
            self._refuse_other_stage("")
        if odd := self._odd(self.path):
            self._keep_stage(f"somebody else changed its stage meanwhile: {in_words(odd)}", None)

    def _odd(self, place: Path) -> list[str]:
        """What the finished checkpoint holds at a place, or lacks, that is not as mopt wrote it."""
        folders = {folder.relative_to(self.path).as_posix() for folder in self._folders}
        tree = look(place)
        now = {name: _state(place / name) for name, one in tree.items() if one.kind != stat.S_IFDIR}
        odd = {name for name in now.keys() | self._written.keys() if now.get(name) != self._written.get(name)}
        return sorted(odd | ((tree.keys() - now.keys()) ^ folders))

    def _late(self) -> tuple[str, ...]:
        """What came between the last look and the swap, in words; nothing could have kept it out."""
        with contextlib.suppress(OSError):
            if odd := self._odd(self.output):
                return (f"somebody else changed {self.output} in the instant of the swap: {in_words(odd)}",)
        return ()

    def _is_mine(self, place: Path) -> bool:
        """Whether a name is that of the folder that this run made."""
        if self._lock is None or not os.path.lexists(place):
            return False
        made, named = os.fstat(self._lock), place.lstat()
        return (made.st_dev, made.st_ino) == (named.st_dev, named.st_ino)

    def _refuse_other_stage(self, where: str) -> NoReturn:
        self._done = True
        self._beside.disown(self._number)
        raise StorageError(
            f"{self.output}: the finished checkpoint could not take its place: {self.path} was moved away, and "
            f"something else has its name{where}",
            code="storage.swap_refused",
            path=str(self.output),
            hint="find out what else writes in that folder, then run again; nothing was removed",
        )

    def _keep_stage(self, why: str, error: Exception | None) -> NoReturn:
        """Give the stage a name that the user can see: a refused swap is no reason to throw checked work away."""
        kept = self._set_aside()
        target = self.output.parent / f"{self.output.name}.new"
        raise StorageError(
            f"{self.output}: the finished checkpoint could not take its place: {why}",
            code="storage.swap_refused",
            path=str(self.output),
            hint=f"it is whole in {kept}{_SWEPT if kept == self.path else ''}; move it yourself: "
            f"mv {shlex.quote(str(kept))} {shlex.quote(str(target))}",
            kept_at=str(kept),
        ) from error

    def _refuse_taken(self, place: Path, error: Exception) -> NoReturn:
        """Say who failed where mopt would write a file and found one: the disk is well, and the file somebody's."""
        name, kept = in_words([str(place.relative_to(self.path))]), self._set_aside()
        raise StorageError(
            f"{self.output}: somebody else put {name} into the stage, where mopt was about to write it",
            code="storage.stage_changed",
            path=str(self.output),
            hint=f"what was found is kept in {kept}{_SWEPT if kept == self.path else ''}; nothing was published",
            kept_at=str(kept),
        ) from error

    def _set_aside(self) -> Path:
        """Give the stage a name that the user can see, and say which."""
        self._done = True
        kept = self._beside.kept_name()
        try:
            fsops.rename(self.path, kept)
            fsops.sync_dir(self.output.parent)
            self._beside.unmark(self._number)
        except OSError:
            if not kept.exists():  # nothing can be renamed here
                kept = self.path
        return kept

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
        kept = None
        if old is not None:
            assert self._marker is not None
            try:
                kept = self._beside.remove(old, self._marker, replaced=True)
            except OSError as error:
                return (f"the old checkpoint in {old} could not be removed: {said(error)}",)
        with contextlib.suppress(OSError):  # the next run removes a marker of nothing
            if old is not None:
                fsops.sync_dir(self.output.parent)
            self._beside.unmark(self._number)
        return (kept,) if kept else ()

    def _discard(self) -> str | None:
        """Remove the stage; where it was kept, since somebody put something into it, in words."""
        if not self._made:
            return None
        # First: these may be the last descriptors that there are, and to remove a folder takes one.
        self._unlock()
        kept = None
        with contextlib.suppress(OSError):  # the next run sweeps what cannot be removed now
            if self._marker is None:  # nothing is in it
                fsops.remove_dir(self.path)
                return None
            kept = self._beside.remove(self.path, self._marker, replaced=False)
            with contextlib.suppress(OSError):
                fsops.sync_dir(self.output.parent)
            self._beside.unmark(self._number)
        return kept

    def _unlock(self) -> None:
        for fd in (self._lock, self._replaced):
            if fd is not None:
                os.close(fd)
        self._lock = self._replaced = None


def _state(path: Path) -> tuple[int, ...]:
    """What changes with another file, or another content, of the same name."""
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
