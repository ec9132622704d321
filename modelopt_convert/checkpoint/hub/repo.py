"""One repo at one commit: its files, and how they are opened. The first question pins the commit."""

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modelopt_convert.checkpoint.hub.answers import HubFile, find_commit, is_commit, list_files, wrong
from modelopt_convert.checkpoint.hub.client import NOT_CACHED, hub_errors
from modelopt_convert.checkpoint.hub.provenance import etag_of
from modelopt_convert.checkpoint.hub.range_source import Outage
from modelopt_convert.checkpoint.hub.remote_file import RemoteFile
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.run.errors import InputError

CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class _Pinned:
    commit: str
    files: Mapping[str, HubFile]
    cached: Path | None  # the snapshot in the cache; None where the Hub was asked


class HubRepo:
    """A repo of models.

    Attributes:
        repo_id: ORGANIZATION/NAME.
        revision: The revision that was asked for; None for the default branch.
        download: Whether files are fetched whole, into the Hub's cache.
    """

    def __init__(self, repo_id: str, revision: str | None, *, download: bool) -> None:
        """Ask nothing yet."""
        self.repo_id = repo_id
        self.revision = revision
        self.download = download
        self._lock = threading.Lock()
        self._remote: dict[str, RemoteFile] = {}
        self._outage = Outage()

    def __str__(self) -> str:
        """The repo as a command line would have it."""
        return f"hf://{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    @property
    def commit(self) -> str:
        """The commit that is read, whatever the branch does meanwhile.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        return self._pinned.commit

    @property
    def files(self) -> Mapping[str, HubFile]:
        """Every file by its path in the repo.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        return self._pinned.files

    @property
    def offline(self) -> bool:
        """Whether only the cache was looked at, so that the commit may have files which are not among ``files``.

        Raises:
            MoptError: With a ``hub.*`` code.
        """
        return self._pinned.cached is not None

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that fetch all files of the repo."""
        return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")

    def cached_file(self, path: str) -> Path | None:
        """A file that the Hub's cache holds whole, at this commit."""
        from huggingface_hub import try_to_load_from_cache

        if self._pinned.cached is not None:
            return self._pinned.cached / path
        found = try_to_load_from_cache(self.repo_id, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def open(self, path: str, *, whole: bool = False) -> "LocalFile | RemoteFile":
        """Open a file: from the cache if it is there, else to be read by ranges.

        Args:
            path: The file's path in the repo.
            whole: Whether the file is fetched into the cache first, as every file is with ``download``.

        Raises:
            MoptError: With an ``input.*`` or ``hub.*`` code.
        """
        where = f"{self}/{path}"
        if path not in self.files:
            if self.offline:
                raise InputError(
                    f"{where}: not in the cache, and the Hub may not be asked",
                    code="hub.not_cached",
                    path=where,
                    hint=NOT_CACHED,
                )
            raise InputError(
                f"{where}: no such file", code="input.missing", path=where, hint=f"see {self}: it is not in that commit"
            )
        local = self.cached_file(path)
        if local is None and (whole or self.download):
            with hub_errors(self.repo_id):
                local = self._fetch_whole(path)
        if local is not None:
            return LocalFile(local.parent, local.name, where=where)
        if path not in self._remote:
            file = self.files[path]
            self._remote[path] = RemoteFile(self.repo_id, self.commit, path, file, self.pool, self._outage, where=where)
        return self._remote[path].open()

    def fetch(self, path: str) -> Path:
        """A file of the repo on disk, whole: in the Hub's cache.

        Raises:
            MoptError: With an ``input.*`` or ``hub.*`` code.
        """
        self.open(path, whole=True).close()
        found = self.cached_file(path)
        assert found is not None
        return found

    def _fetch_whole(self, path: str) -> Path:
        """Put a file into the cache as the Hub's client does; its bytes are those that the listing names.

        The client's own download would take names for the cache from answers that nobody checked.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        file = self.files[path]
        root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo_id, repo_type="model")
        blob, pointer = root / "blobs" / file.etag, root / "snapshots" / self.commit / path
        for folder in (blob.parent, pointer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if not blob.is_file() or blob.stat().st_size != file.num_bytes:
            self._fetch_blob(path, file, blob)
        _replace(pointer, lambda name: name.symlink_to(os.path.relpath(blob, pointer.parent)))
        # So the cache knows the name's commit when the Hub may not be asked.
        reference = root / "refs" / (self.revision or constants.DEFAULT_REVISION)
        if reference.name != self.commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            _replace(reference, lambda name: name.write_text(self.commit))
        return pointer

    def _fetch_blob(self, path: str, file: HubFile, blob: Path) -> None:
        partial = blob.with_name(f"{blob.name}.{secrets.token_hex(4)}.incomplete")
        try:
            with partial.open("w+b") as spool:
                remote = RemoteFile(
                    self.repo_id,
                    self.commit,
                    path,
                    file,
                    self.pool,
                    self._outage,
                    where=f"{self}/{path}",
                    spool=spool,
                ).open()
                try:
                    remote.wait(0, file.num_bytes)
                finally:
                    remote.close()
                if (found := etag_of(spool, file.num_bytes, like=file.etag)) != file.etag:
                    raise wrong(self.repo_id, f"{path}, its bytes", f"the digest {file.etag}", found)
            partial.replace(blob)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def _pinned(self) -> _Pinned:
        with self._lock:
            return self._pin

    @cached_property
    def _pin(self) -> _Pinned:
        from huggingface_hub.errors import OfflineModeIsEnabled

        with hub_errors(self.repo_id):
            try:
                commit = find_commit(self.repo_id, self.revision)
                return _Pinned(commit, list_files(self.repo_id, commit), None)
            except OfflineModeIsEnabled:
                return self._from_cache()

    def _from_cache(self) -> _Pinned:
        """The snapshot that the cache has of the revision, as far as it goes."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError

        try:
            folder = Path(snapshot_download(self.repo_id, revision=self.revision, local_files_only=True))
        except IncompleteSnapshotError as error:
            folder = Path(error.snapshot_path)
        if not is_commit(folder.name):
            raise wrong(self.repo_id, "the commit in the cache", "40 hex digits", folder.name)
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): HubFile(path.stat().st_size, "", None) for path in paths}
        return _Pinned(folder.name, files, folder)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file of the cache under another name first: whoever reads the cache meanwhile finds the old or the new."""
    new = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        make(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
