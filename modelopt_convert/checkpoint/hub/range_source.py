"""Fetch byte ranges of one file: over HTTP from the link that the Hub gives, or through hf_xet where that is better.

A link is resolved once and serves until it expires. What comes is what was asked for, or an error: a proxy that ignores
ranges answers 200 with the whole file, and a broken proxy answers with other bytes.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from modelopt_convert.checkpoint.hub import watch
from modelopt_convert.checkpoint.hub.answers import HubFile, use_xet, xet_access
from modelopt_convert.checkpoint.hub.client import (
    BUSY,
    PAUSES_S,
    first_line,
    http_library,
    hub_headers,
    is_endpoint,
    read_whole,
    retry_after,
    shown,
)
from modelopt_convert.run.errors import InputError, RemoteError

if TYPE_CHECKING:
    from hf_xet import XetDownloadStreamGroup

# hf_xet fetches whole chunks of 64 KiB, and so up to one too many at each end: below this size HTTP brings fewer bytes.
XET_BYTES = 4 << 20
_EXPIRED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class _Link:
    url: str
    headers: dict[str, str]
    signed: bool  # it leads elsewhere than to the Hub, and expires
    has_xet: bool


@dataclass(slots=True)
class Outage:
    """Why a repo's bytes are not to be had, once that is known: nobody then waits for another file in vain."""

    error: Exception | None = None


@dataclass(slots=True)
class _Attempt:
    """How far an attempt has come, and whether it was given up: what comes still is dropped then."""

    at: int
    given_up: bool = False


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

    def __init__(self, repo_id: str, commit: str, path: str, file: HubFile, outage: Outage) -> None:
        """Ask nothing yet."""
        self._repo_id = repo_id
        self._commit = commit
        self._path = path
        self._num_bytes = file.num_bytes
        self._etag = file.etag
        self._xet_hash = file.xet_hash
        self._where = f"hf://{repo_id}@{commit[:12]}/{path}"
        self._outage = outage
        self._counting = threading.Lock()
        self._asking = threading.Lock()  # held while the Hub is asked; an attempt that is given up keeps it for ever
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
            StalledError: The Hub is too slow.
            OSError, HTTPError: What the client raises.
        """
        httpx = http_library()
        since, failures = time.monotonic(), 0
        while begin < end and not stopped.is_set():
            if self._outage.error is not None:
                raise self._outage.error
            attempt = _Attempt(begin)
            try:
                self._watched(attempt, end, put, stopped)
                return
            except CancelledError:
                return
            except (
                _AgainError,
                watch.StalledError,
                httpx.TimeoutException,
                httpx.NetworkError,
                httpx.RemoteProtocolError,
            ) as error:
                if attempt.at - begin >= watch.LEAST_BYTES and not isinstance(error, watch.StalledError):
                    since, failures = time.monotonic(), 0
                else:
                    failures += 1
                begin = attempt.at
                asked = error.pause_s if isinstance(error, _AgainError) else None
                pause = PAUSES_S[min(max(0, failures - 1), len(PAUSES_S) - 1)] if asked is None else asked
                if failures > len(PAUSES_S) or time.monotonic() + pause - since > watch.PATIENCE_S:
                    self._outage.error = lasting = self._lasting(error, begin, end)
                    if lasting is error:
                        raise
                    raise lasting from error
                stopped.wait(pause)

    def _watched(
        self, attempt: _Attempt, end: int, put: Callable[[bytes, int], None], stopped: threading.Event
    ) -> None:
        begin = attempt.at
        with self._counting:
            self.requests += 1

        def run() -> None:
            for chunk in self._stream(begin, end):
                if attempt.given_up:
                    return
                if len(chunk) > end - attempt.at:
                    raise self._range_error(begin, end, "more bytes")
                put(chunk, attempt.at)
                attempt.at += len(chunk)
            if attempt.at < end:
                raise _AgainError(f"{end - attempt.at} bytes short")

        try:
            watch.watched(run, watch.STALL_S, moved=lambda: attempt.at, stopped=stopped)
        except watch.StalledError:
            self._xet_hash, self._asking = None, threading.Lock()
            raise
        finally:
            attempt.given_up = True

    def _lasting(self, error: Exception, begin: int, end: int) -> Exception:
        """The error for what new attempts did not mend."""
        if isinstance(error, watch.StalledError):
            return watch.StalledError(f"{self._path}, bytes {begin} to {end}: {error}")
        if not isinstance(error, _AgainError):
            return error
        return RemoteError(
            f"{self._where}: bytes {begin} to {end} cannot be fetched: {error}",
            code="hub.cut",
            path=self._where,
            hint="run the same command again",
        )

    def _stream(self, begin: int, end: int) -> Iterator[bytes]:
        if self._xet_hash is not None and end - begin >= XET_BYTES and (group := self._xet_group()) is not None:
            yield from self._by_xet(group, self._xet_hash, begin, end)
        else:
            yield from self._by_http(begin, end)

    def _by_xet(self, group: "XetDownloadStreamGroup", xet_hash: str, begin: int, end: int) -> Iterator[bytes]:
        from hf_xet import XetFileInfo

        try:
            yield from group.download_stream(XetFileInfo(xet_hash, self._num_bytes), begin, end)
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
                hf_raise_for_status(read_whole(response))
                raise self._range_error(begin, end, f"status {status}")
            said = response.headers.get("Content-Range", "")
            expected = self._num_bytes if status == 200 else _length(said, begin, end, self._num_bytes)
            if expected is None:
                raise self._range_error(begin, end, shown(said) if said else "no Content-Range")
            for name, wanted in (("Content-Encoding", "identity"), ("Content-Length", str(expected))):
                if (found := response.headers.get(name, wanted)) != wanted:
                    raise self._range_error(begin, end, f"{name} {shown(found)}")
            yield from response.iter_raw()  # as they come: a cut would lose what a larger piece had gathered

    def _range_error(self, begin: int, end: int, found: str) -> RemoteError:
        return RemoteError(
            f"{self._where}: asked for bytes {begin} to {end - 1}, got {found}",
            code="hub.range",
            path=self._where,
            hint="something between here and the Hub breaks range requests: try another network or HF_ENDPOINT",
        )

    def _link(self) -> _Link:
        """Where the file's bytes are, resolved once; whoever comes meanwhile waits."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        with self._asking:
            if self._found is not None:
                return self._found
            headers = hub_headers()
            url = hf_hub_url(self._repo_id, self._path, revision=self._commit)
            try:
                now = get_hf_file_metadata(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except HfHubHTTPError as error:
                if error.response.status_code in BUSY:
                    pause = retry_after(error.response.headers)
                    raise _AgainError(f"the Hub answers {error.response.status_code}", pause) from error
                raise
            if (now.commit_hash, now.etag, now.size) != (self._commit, self._etag, self._num_bytes):
                raise InputError(
                    f"{self._where}: expected {self._num_bytes} bytes with etag {self._etag[:16]} at {self._commit}, "
                    f"found {shown(now.size)} with {shown(now.etag)} at {shown(now.commit_hash)}",
                    code="hub.changed",
                    path=self._where,
                    hint="it is not the file that was listed: run again, and clear the mirror's cache if there is one",
                )
            signed = not is_endpoint(now.location)
            # Whoever keeps the bytes must not see the Hub's token.
            self._found = _Link(now.location, {} if signed else headers, signed, now.xet_file_data is not None)
            return self._found

    def _forget(self, link: _Link) -> None:
        if self._found is link:
            self._found = None

    def _xet_group(self) -> "XetDownloadStreamGroup | None":
        """What hf_xet streams this repo from; None where hf_xet is not to be used."""
        from huggingface_hub import constants

        if not self._link().has_xet or not use_xet():
            return None
        with self._asking:
            if self._group is None:
                access = xet_access(self._repo_id, "read", self._commit, {})
                headers = hub_headers()
                self._group = _xet_session().new_download_stream_group(
                    endpoint=access.endpoint,
                    token=access.token,
                    token_expiry_unix_secs=access.until,
                    token_refresh_url=f"{constants.ENDPOINT}/api/models/{self._repo_id}/xet-read-token/{self._commit}",
                    token_refresh_headers=headers,
                    custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
                )
            return self._group


@lru_cache(maxsize=1)
def _xet_session() -> Any:
    from hf_xet import XetSession

    return XetSession()


def _length(said: str, begin: int, end: int, num_bytes: int) -> int | None:
    """How many bytes an answer has, which may be fewer than were asked for.

    Returns:
        None where it is not of a file of that size, or begins elsewhere.
    """
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", said)
    if found is None or found[3] not in ("*", str(num_bytes)):
        return None
    length = int(found[2]) + 1 - begin
    return length if int(found[1]) == begin and 0 < length <= end - begin else None
