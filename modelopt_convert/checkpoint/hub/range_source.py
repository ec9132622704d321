"""Fetch byte ranges of one file: over HTTP from the link that the Hub gives, or through hf_xet where that is better.

A link is resolved once and serves until it expires. What comes is what was asked for, or an error: a proxy that ignores
ranges answers 200 with the whole file, and a broken proxy answers with other bytes.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelopt_convert.checkpoint.hub.client import BUSY, PAUSES_S, first_line, http_library, retry_after
from modelopt_convert.run.errors import InputError, RemoteError

if TYPE_CHECKING:
    from hf_xet import XetDownloadStreamGroup

# hf_xet fetches whole chunks of 64 KiB, and so up to one too many at each end: below this size HTTP brings fewer bytes.
XET_BYTES = 4 << 20
_EXPIRED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the Hub lists it.

    Attributes:
        num_bytes: Its size.
        etag: SHA-256 of a file in LFS or Xet, else git's blob id; a link to the file must say the same.
        xet_hash: The hash by which Xet knows the file; None if Xet does not.
    """

    num_bytes: int
    etag: str
    xet_hash: str | None


@dataclass(frozen=True, slots=True)
class _Link:
    url: str
    headers: dict[str, str]
    signed: bool  # it leads elsewhere than to the Hub, and expires
    xet_route: str | None


class _AgainError(Exception):
    """A failure that a new attempt may mend."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class RangeSource:
    """One file of a repo at a commit.

    Attributes:
        requests: How many ranges were asked for.
    """

    def __init__(self, repo_id: str, commit: str, path: str, file: HubFile) -> None:
        """Ask nothing yet."""
        self._repo_id = repo_id
        self._commit = commit
        self._path = path
        self._num_bytes = file.num_bytes
        self._etag = file.etag
        self._xet_hash = file.xet_hash
        self._where = f"hf://{repo_id}@{commit[:12]}/{path}"
        self._lock = threading.Lock()
        self._found: _Link | None = None
        self._group: XetDownloadStreamGroup | None = None
        self.requests = 0

    def fetch(self, begin: int, end: int, put: Callable[[bytes, int], None], stopped: threading.Event) -> None:
        """Fetch [begin, end), going on where a connection was cut.

        Args:
            begin: First byte.
            end: The byte behind the last.
            put: Takes bytes, and their offset in the file.
            stopped: Once this is set, the rest is not fetched, and nothing is raised.

        Raises:
            InputError: ``hub.changed``: the file is not the one that was listed.
            RemoteError: ``hub.range`` or ``hub.cut``.
            OSError, HTTPError: What the client raises.
        """
        httpx = http_library()
        failures = 0
        while begin < end and not stopped.is_set():
            before = begin
            try:
                for chunk in self._stream(begin, end):
                    put(chunk, begin)
                    begin += len(chunk)
                    if stopped.is_set():
                        return
                if begin < end:
                    raise _AgainError(f"{end - begin} bytes short")
            except (_AgainError, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
                failures = 0 if begin > before else failures + 1
                if failures > len(PAUSES_S):
                    if not isinstance(error, _AgainError):
                        raise
                    raise RemoteError(
                        f"{self._where}: bytes {begin} to {end} cannot be had: {error}",
                        code="hub.cut",
                        path=self._where,
                        hint="run the same command again; --download fetches whole files",
                    ) from error
                asked = error.pause_s if isinstance(error, _AgainError) else None
                pause = PAUSES_S[max(0, failures - 1)] if asked is None else asked
                stopped.wait(pause)

    def _stream(self, begin: int, end: int) -> Iterator[bytes]:
        with self._lock:
            self.requests += 1
        if self._xet_hash is not None and end - begin >= XET_BYTES and (group := self._xet_group()) is not None:
            yield from self._by_xet(group, begin, end)
        else:
            yield from self._by_http(begin, end)

    def _by_xet(self, group: "XetDownloadStreamGroup", begin: int, end: int) -> Iterator[bytes]:
        from hf_xet import XetFileInfo

        try:
            yield from group.download_stream(XetFileInfo(self._xet_hash, self._num_bytes), begin, end)
        except GeneratorExit:
            raise
        except Exception as error:  # hf_xet has tried again by itself; HTTP gives the same bytes
            self._xet_hash = None
            raise _AgainError(f"Xet failed: {first_line(error)}", pause_s=0.0) from error

    def _by_http(self, begin: int, end: int) -> Iterator[bytes]:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        link = self._link()
        headers = link.headers | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", link.url, headers=headers, timeout=timeout) as response:
            status = response.status_code
            if link.signed and status in _EXPIRED:
                self._forget(link)
                raise _AgainError(f"the link is refused with status {status}", pause_s=0.0)
            if status in BUSY:
                raise _AgainError(f"the server answers {status}", retry_after(response.headers))
            whole = begin == 0 and end == self._num_bytes
            if status == 200 and not whole:
                raise self._range_error(begin, end, "the whole file")
            if status not in (200, 206):
                response.read()
                hf_raise_for_status(response)
                raise self._range_error(begin, end, f"status {status}")
            said = response.headers.get("Content-Range", "")
            if status == 206 and not _is_range(said, begin, end, self._num_bytes):
                raise self._range_error(begin, end, said or "no Content-Range")
            missing = end - begin
            for chunk in response.iter_bytes():  # as they come: a cut would lose what a larger piece had gathered
                missing -= len(chunk)
                if missing < 0:
                    raise self._range_error(begin, end, "more bytes")
                yield chunk

    def _range_error(self, begin: int, end: int, found: str) -> RemoteError:
        return RemoteError(
            f"{self._where}: asked for bytes {begin} to {end - 1}, got {found}",
            code="hub.range",
            path=self._where,
            hint="something between here and the Hub breaks range requests; --download fetches whole files",
        )

    def _link(self) -> _Link:
        """Where the file's bytes are, resolved once; whoever comes meanwhile waits."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers

        with self._lock:
            if self._found is not None:
                return self._found
            url = hf_hub_url(self._repo_id, self._path, revision=self._commit)
            try:
                now = get_hf_file_metadata(url, library_name="mopt", timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except HfHubHTTPError as error:
                if error.response.status_code in BUSY:
                    pause = retry_after(error.response.headers)
                    raise _AgainError(f"the Hub answers {error.response.status_code}", pause) from error
                raise
            if (now.commit_hash, now.etag, now.size) != (self._commit, self._etag, self._num_bytes):
                raise InputError(
                    f"{self._where}: expected {self._num_bytes} bytes with etag {self._etag[:16]}, "
                    f"found {now.size} with {str(now.etag)[:16]}",
                    code="hub.changed",
                    path=self._where,
                    hint="it is not the file that was listed: run again, and clear the mirror's cache if there is one",
                )
            signed = urlsplit(now.location).netloc != urlsplit(constants.ENDPOINT).netloc
            # Whoever keeps the bytes must not see the Hub's token.
            headers = {} if signed else build_hf_headers(library_name="mopt")
            route = now.xet_file_data.refresh_route if now.xet_file_data is not None else None
            self._found = _Link(now.location, headers, signed, route)
            return self._found

    def _forget(self, link: _Link) -> None:
        with self._lock:
            if self._found is link:
                self._found = None

    def _xet_group(self) -> "XetDownloadStreamGroup | None":
        """What hf_xet streams this repo from; None where hf_xet is not to be used."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        route = self._link().xet_route
        if route is None or constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return None
        with self._lock:
            if self._group is None:
                headers = build_hf_headers(library_name="mopt")
                self._group = _xet_session().new_download_stream_group(
                    token_refresh_url=route,
                    token_refresh_headers=headers,
                    custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
                )
            return self._group


@lru_cache(maxsize=1)
def _xet_session() -> Any:
    from hf_xet import XetSession

    return XetSession()


def _is_range(said: str, begin: int, end: int, num_bytes: int) -> bool:
    """Whether an answer is of a file of that size and begins where it should; a server may answer with less."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said)
    if found is None or found[3] not in ("*", str(num_bytes)):
        return False
    return int(found[1]) == begin and begin <= int(found[2]) < end
