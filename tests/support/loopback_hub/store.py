"""Repos, commits and the bytes behind them. Metadata is in memory, contents are files below one folder."""

import hashlib
import itertools
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loopback_hub.records import HubError
from loopback_hub.xet import XetMode, XetStore

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy", ".zip", ".png", ".jpg")
LFS_THRESHOLD = 10 * 2**20
INITIAL_FILE = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether a file goes to LFS or Xet: by name, size, or for being binary."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD or b"\0" in sample


def git_id(data: bytes) -> str:
    """The id of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


@dataclass(frozen=True)
class Entry:
    """A file in a commit; ``sha256`` if it is behind an LFS pointer, whose id and size the other two then are."""

    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with all its files."""

    oid: str
    parent: str | None
    title: str
    description: str
    date: str
    tree: Mapping[str, Entry]


@dataclass
class Pull:
    """A discussion or pull request."""

    number: int
    title: str
    description: str
    is_pull: bool
    status: str
    created: str


@dataclass
class Repo:
    """A model repo; ``refs`` are branches by name and pull requests as ``refs/pr/N``."""

    id: str
    owner: str
    private: bool
    gated: bool
    created: str
    refs: dict[str, str]
    pulls: list[Pull] = field(default_factory=list)

    def open_pull(self, title: str, description: str, status: str, commit: str | None) -> Pull:
        pull = Pull(len(self.pulls) + 1, title, description, commit is not None, status, _now())
        self.pulls.append(pull)
        if commit is not None:
            self.refs[f"refs/pr/{pull.number}"] = commit
        return pull


class Store:
    """The state of one Hub, from reset to reset."""

    def __init__(self, root: Path, xet: XetMode, url: str) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.commits: dict[str, Commit] = {}
        for name in ("blobs", "lfs", "parts"):
            (root / name).mkdir(parents=True)
        self.xet = XetStore(root, xet, url)
        self._numbers = itertools.count()

    def temporary(self) -> Path:
        """A name for a file that is being received."""
        return self.root / "parts" / f"incoming.{next(self._numbers)}"

    def create(self, repo_id: str, owner: str, *, private: bool) -> Repo:
        first = self.add_commit(None, "initial commit", {".gitattributes": self.put_blob(INITIAL_FILE)})
        self.repos[repo_id] = Repo(repo_id, owner, private, False, _now(), {"main": first.oid})
        return self.repos[repo_id]

    def add_commit(self, parent: str | None, title: str, tree: Mapping[str, Entry], description: str = "") -> Commit:
        listing = [(path, entry.etag) for path, entry in sorted(tree.items())]
        oid = hashlib.sha1(repr((parent, title, description, listing, next(self._numbers))).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, _now(), dict(tree))
        return self.commits[oid]

    def commit(self, repo: Repo, revision: str) -> Commit:
        """The commit of a branch, a pull request or the beginning of a commit's id."""
        name = urllib.parse.unquote(revision).removeprefix("refs/heads/")
        if name in repo.refs:
            return self.commits[repo.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", name):
            for oid, commit in self.commits.items():
                if oid.startswith(name):
                    return commit
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def history(self, repo: Repo, revision: str) -> list[Commit]:
        """A commit and what led to it, newest first."""
        found = [self.commit(repo, revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def put_blob(self, data: bytes) -> Entry:
        oid = git_id(data)
        (self.root / "blobs" / oid).write_bytes(data)
        return Entry(oid, len(data))

    def has_object(self, sha256: str) -> bool:
        return (self.root / "lfs" / sha256).exists() or sha256 in self.xet.hashes

    def lfs_entry(self, path: str, sha256: str) -> Entry:
        """The entry of an object that has been uploaded before."""
        if (stored := self.root / "lfs" / sha256).exists():
            size = stored.stat().st_size
        elif sha256 in self.xet.hashes:
            size = self.xet.size(sha256)
        else:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(git_id(pointer), size, sha256, len(pointer))

    def take_in(self, path: Path) -> str:
        """Keep a file as an LFS or Xet object, and give its SHA-256."""
        if self.xet.mode != "off":
            return self.xet.upload(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, self.root / "lfs" / digest)
        return digest

    def contents(self, entry: Entry) -> Path:
        """A file with what an entry stands for."""
        if entry.sha256 is None:
            return self.root / "blobs" / entry.oid
        return self.object_file(entry.sha256)

    def object_file(self, sha256: str) -> Path:
        """A file with the bytes of an LFS or Xet object; Xet ones are put together on first use."""
        stored = self.root / "lfs" / sha256
        if stored.exists():
            return stored
        if sha256 not in self.xet.hashes:
            raise HubError(404, "no such object", "EntryNotFound")
        return self.xet.assembled(sha256)

    def card(self, tree: Mapping[str, Entry]) -> dict[str, Any]:
        """The metadata at the head of README.md."""
        if "README.md" not in tree:
            return {}
        text = self.contents(tree["README.md"]).read_text()
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        return (yaml.safe_load(match[1]) or {}) if match else {}
