"""Of which repo and commit a folder on disk is, as far as the Hub's client has left a trace of it. No network.

A trace is what somebody's client wrote there: it says where the files came from, and proves nothing of their bytes.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO

from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.run.errors import InputError

_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)", re.ASCII)
_METADATA = Path(".cache/huggingface/download")
_COMMIT = re.compile("[0-9a-f]{40}")
_MAX_METADATA_BYTES = 1000
_CHUNK_BYTES = 1 << 22


def trace(folder: Path, small: Mapping[str, bytes], files: Iterable[str]) -> dict[str, str]:
    """What identifies the origin of a checkpoint on disk.

    Args:
        folder: Of the checkpoint.
        small: The bytes of its small files, by name.
        files: Names of its other files.

    Returns:
        ``origin``, and what is known with it:
        ``cache``: a snapshot in a Hub cache, with ``repo`` and ``commit``;
        ``download``: made by ``hf download --local-dir``, with ``commit``; ``checked`` names the files whose bytes are
        those of that commit. No file has changed since, by its time;
        ``folder``: nothing tells.
    """
    real = folder.resolve()
    if match := _SNAPSHOT.search(real.as_posix()):
        return {"origin": "cache", "repo": match[1].replace("--", "/"), "commit": match[2]}
    for root in (real, *real.parents):
        metadata = root / _METADATA / real.relative_to(root)
        try:
            commit = _commit_of(real, metadata, small, files) if metadata.is_dir() else None
        except OSError:  # a folder above may be closed to us, or the path be too long for a file system
            continue
        if commit is not None:
            return {"origin": "download", "commit": commit, "checked": ", ".join(sorted(small))}
    return {"origin": "folder"}


def _commit_of(folder: Path, metadata: Path, small: Mapping[str, bytes], files: Iterable[str]) -> str | None:
    """The one commit of all files; None if there is none, or a file is not known to be the downloaded one."""
    commits = set()
    for name in (*small, *files):
        found = _read_metadata(metadata / f"{name}.metadata")
        if found is None:
            return None
        commit, etag, time = found
        try:
            # A second of grace, as the client itself gives: it writes the file first.
            same = (folder / name).stat().st_mtime - 1 <= time  # not where the time is no number
        except OSError:
            return None
        if not same or (name in small and etag != etag_of(BytesIO(small[name]), len(small[name]), like=etag)):
            return None
        commits.add(commit)
    return commits.pop() if small and len(commits) == 1 else None


def _read_metadata(path: Path) -> tuple[str, str, float] | None:
    """Commit, etag and time of a download, or None if the file does not say them."""
    try:
        file = LocalFile(path.parent, path.name)
    except InputError:
        return None
    try:
        commit, etag, time = file.read(0, min(file.num_bytes, _MAX_METADATA_BYTES)).decode().split()
        return (commit, etag, float(time)) if _COMMIT.fullmatch(commit) else None
    except (InputError, OSError, ValueError):
        return None
    finally:
        file.close()


def etag_of(file: IO[bytes], num_bytes: int, *, like: str) -> str:
    """The etag that the Hub gives such bytes: SHA-256 of a file in LFS, else git's blob id.

    Args:
        file: Open, and read from its beginning.
        num_bytes: Its size.
        like: An etag of the kind that is asked for.
    """
    if len(like) == hashlib.sha256().digest_size * 2:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
