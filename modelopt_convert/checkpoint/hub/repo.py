"""One repo at one commit: its files, and how they are opened. The first question pins the commit."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modelopt_convert.checkpoint.hub.client import NOT_CACHED, hub_api, hub_errors, retried
from modelopt_convert.checkpoint.hub.range_source import HubFile
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
            local = self._fetch_whole(path)
        if local is not None:
            return LocalFile(local.parent, local.name, where=where)
        if path not in self._remote:
            file = self.files[path]
            self._remote[path] = RemoteFile(self.repo_id, self.commit, path, file, self.pool, where=where)
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
        from huggingface_hub import hf_hub_download

        # Asked for by the revision's name first: so the cache knows the name's commit when the Hub may not be asked.
        for revision in (self.revision, self.commit):
            with hub_errors(self.repo_id):
                found = Path(hf_hub_download(self.repo_id, path, revision=revision, library_name="mopt"))
            if self.cached_file(path) is not None:
                break
        return found

    @property
    def _pinned(self) -> _Pinned:
        with self._lock:
            return self._pin

    @cached_property
    def _pin(self) -> _Pinned:
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.hf_api import RepoFile

        api = hub_api()
        with hub_errors(self.repo_id):
            try:
                commit = retried(lambda: api.model_info(self.repo_id, revision=self.revision).sha)
                assert commit is not None  # the Hub names it wherever a revision is found
                tree = retried(lambda: list(api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
                found = [one for one in tree if isinstance(one, RepoFile)]
            except OfflineModeIsEnabled:
                return self._from_cache()
        files = {one.path: HubFile(one.size, one.lfs.sha256 if one.lfs else one.blob_id, one.xet_hash) for one in found}
        return _Pinned(commit, files, None)

    def _from_cache(self) -> _Pinned:
        """The snapshot that the cache has of the revision, as far as it goes."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError

        try:
            folder = Path(snapshot_download(self.repo_id, revision=self.revision, local_files_only=True))
        except IncompleteSnapshotError as error:
            folder = Path(error.snapshot_path)
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): HubFile(path.stat().st_size, "", None) for path in paths}
        return _Pinned(folder.name, files, folder)
