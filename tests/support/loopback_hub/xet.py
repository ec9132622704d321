"""What a Xet server keeps: which chunks of which xorbs make up a file, and where those lie in a xorb's bytes.

Two things need the real library: taking in a file, and putting one together for readers that know only plain HTTP.
"""

import re
import secrets
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loopback_hub.records import HubError

XetMode = Literal["off", "http", "local"]
# With this token the Hub talks to itself. Such requests are not in the log.
OWN_TOKEN = "xet-of-the-hub-itself"
_SHARD_HEADER = 48
_ENTRY = 48
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30


def _hex(hashed: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hashed))


@dataclass(frozen=True)
class Term:
    """Some chunks of a xorb, as part of a file."""

    xorb: str
    start: int
    end: int
    size: int


class XetStore:
    """Files by their Xet hash, and Xet hashes by the SHA-256 that a commit knows."""

    def __init__(self, root: Path, mode: XetMode, url: str) -> None:
        self.mode = mode
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}
        self.xorbs = root / "xorbs"
        self._assembled = root / "assembled"
        self._local = root / "local_cas"
        for folder in (self.xorbs, self._assembled, self._local):
            folder.mkdir()
        self.cas_url = f"local://{self._local.resolve()}" if mode == "local" else f"{url}/cas"
        self._seen: set[Path] = set()
        self._lock = threading.Lock()
        # The client keeps shards it has sent. What the Hub itself sends must not be known to a client in this process.
        self._cache_name = f"hub-{secrets.token_hex(8)}"

    def size(self, sha256: str) -> int:
        return sum(term.size for term in self.files[self.hashes[sha256]])

    def hash_of(self, sha256: str | None) -> str | None:
        return self.hashes.get(sha256) if sha256 and self.mode != "off" else None

    def add_shard(self, shard: bytes) -> None:
        """Take in a shard: for every file its terms, and its SHA-256 where given."""
        at = _SHARD_HEADER
        while (hashed := shard[at : at + 32]) != _END:
            flags, count = struct.unpack_from("<II", shard, at + 32)
            at += _ENTRY
            terms = []
            for _ in range(count):
                _, size, start, end = struct.unpack_from("<4I", shard, at + 32)
                terms.append(Term(_hex(shard[at : at + 32]), start, end, size))
                at += _ENTRY
            if flags & _HAS_VERIFICATION:
                at += _ENTRY * count
            if flags & _HAS_SHA256:
                self.hashes[_hex(shard[at : at + 32])] = _hex(hashed)
                at += _ENTRY
            self.files[_hex(hashed)] = terms

    def scan(self) -> None:
        """Take in the shards that clients wrote to the folder themselves."""
        for path in self._local.rglob("*.mdb"):
            if path not in self._seen:
                self._seen.add(path)
                self.add_shard(path.read_bytes())

    def _boundaries(self, xorb: str) -> list[tuple[int, int]]:
        """Where the chunks of a xorb begin and end: in its own bytes, and in those it unpacks to."""
        data = (self.xorbs / xorb).read_bytes()
        packed = unpacked = 0
        found = [(0, 0)]
        while packed + 8 <= len(data) and data[packed] == 0:
            unpacked += int.from_bytes(data[packed + 5 : packed + 8], "little")
            packed += 8 + int.from_bytes(data[packed + 1 : packed + 4], "little")
            found.append((packed, unpacked))
        return found

    def reconstruction(self, hashed: str, asked: str | None) -> Mapping[str, Any]:
        """Which bytes of which xorbs a client needs for a file, or for a range of it."""
        terms = self.files.get(hashed)
        if terms is None:
            raise HubError(404, "file not found")
        total = sum(term.size for term in terms)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        low, high = (int(match[1]), min(int(match[2]), total - 1)) if match else (0, total - 1)
        if low >= total:
            raise HubError(416, "beyond the end of the file")
        found: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        begin, skip = 0, None
        for term in terms:
            here, begin = begin, begin + term.size
            if begin <= low or here > high:
                continue
            boundaries = self._boundaries(term.xorb)
            # Where this term's first chunk would begin if all of the xorb lay before it in the file.
            shift = here - boundaries[term.start][1]
            first, end = term.start, term.end
            while first + 1 < end and shift + boundaries[first + 1][1] <= low:
                first += 1
            while end - 1 > first and shift + boundaries[end - 1][1] > high:
                end -= 1
            if skip is None:
                skip = low - (shift + boundaries[first][1])
            chunks = {"start": first, "end": end}
            unpacked = boundaries[end][1] - boundaries[first][1]
            found.append({"hash": term.xorb, "range": chunks, "unpacked_length": unpacked})
            where = {"start": boundaries[first][0], "end": boundaries[end][0] - 1}
            url = f"{self.cas_url}/fetch/{term.xorb}"
            fetch.setdefault(term.xorb, []).append({"range": chunks, "url": url, "url_range": where})
        return {"offset_into_first_range": skip or 0, "terms": found, "fetch_info": fetch}

    def upload(self, path: Path) -> str:
        """Take in a file as a client would send it, and give its SHA-256."""
        with self._session().new_upload_commit(**self._connection()) as commit:
            handle = commit.start_upload_file(str(path))
        self.scan()
        return str(handle.result().xet_info.sha256)

    def assembled(self, sha256: str) -> Path:
        """A file with the bytes that a SHA-256 stands for."""
        import hf_xet

        path = self._assembled / sha256
        with self._lock:
            if not path.exists():
                info = hf_xet.XetFileInfo(self.hashes[sha256], self.size(sha256))
                with self._session().new_file_download_group(**self._connection()) as group:
                    group.start_download_file(info, str(path))
        return path

    def _session(self) -> Any:
        import hf_xet

        return hf_xet.XetSession(hf_xet.XetConfig().with_config("shard.cache_subdir", self._cache_name))

    def _connection(self) -> dict[str, Any]:
        return {
            "endpoint": self.cas_url,
            "token": OWN_TOKEN,
            "token_expiry_unix_secs": int(time.time()) + 3600,
        }
