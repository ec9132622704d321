"""The Hub as tests use it."""

import http.server
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loopback_hub import api, files
from loopback_hub.records import Fault, FaultKind, HubError, Request
from loopback_hub.store import Commit, Store, is_lfs
from loopback_hub.xet import XetMode

_ROUTES: list[tuple[re.Pattern[str], Callable[..., None]]] = [
    (re.compile(pattern), answer) for pattern, answer in (api.ROUTES | files.ROUTES).items()
]


class _Handler(api.Api, files.Files):
    def route(self, path: str) -> None:
        for pattern, answer in _ROUTES:
            if (match := pattern.fullmatch(path)) is not None:
                return answer(self, *(group and urllib.parse.unquote(group) for group in match.groups()))
        raise HubError(404, f"no route {self.command} {path}")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: "LoopbackHub") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on stderr, where a test looks for what mopt says: clients go away."""

    def server_bind(self) -> None:
        """Without the look-up of this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


class LoopbackHub:
    """A Hugging Face Hub on this machine, in threads of this process.

    ``hf_owner`` is the token of alice, who may create repos anywhere; ``hf_reader`` that of bob, who is on no list of
    a gated repo. Contents of LFS and Xet files come from another host name, where no token belongs.

    Attributes:
        url: The endpoint. It stays the same from reset to reset.
        cdn_url: The same server under the other name.
        log: All requests since the last reset, but for what the Hub asks itself.
        multipart_over: LFS objects above this size are asked for in parts of this size; 0 for never.
        xet: Which Xet there is: ``off``, ``http``, or ``local``, where clients write to a folder.
        line: Waits for its turn with so many bytes of a body, before they are sent; None for a line without a limit.
    """

    def __init__(self, root: Path) -> None:
        self.line: Callable[[int], None] | None = None
        self._server = _Server(self)
        port = self._server.server_port
        self.url = f"http://127.0.0.1:{port}"
        self.cdn_url = f"http://localhost:{port}"
        self._lock = threading.Lock()
        self.reset(root)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self, root: Path, xet: XetMode = "off") -> None:
        """Forget everything; what comes is kept below ``root``, which must not hold another Hub's files."""
        self.root, self.xet = root, xet
        self.store = Store(root, xet, self.url)
        self.log: list[Request] = []
        self.multipart_over = 0
        self._faults: list[Fault] = []
        self._twists: list[tuple[re.Pattern[str], Callable[[Any], Any]]] = []
        self._signed = self._expired = 0
        self.over = threading.Event()  # once it is set, nobody is kept waiting any more

    def forget_faults(self) -> None:
        """Answer from now on."""
        with self._lock:
            self._faults.clear()
            self._twists.clear()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()

    def seed(
        self,
        repo_id: str,
        folder: Path,
        *,
        message: str = "seed",
        private: bool = False,
        gated: bool = False,
        owner: str = "alice",
    ) -> str:
        """Put all files of a folder into a repo as one commit that is not in the log; the repo is made if need be.

        Where there is Xet, hf_xet takes the large files in as it does for any client.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        with self.store.lock:
            repo = self.store.repos.get(repo_id) or self.store.create(repo_id, owner, private=private)
            repo.private, repo.gated = private, gated
            parent = self.store.commit(repo, "main")
        tree = dict(parent.tree)
        for path in paths:
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            if not is_lfs(name, len(data), data[:512]):
                tree[name] = self.store.put_blob(data)
            else:
                tree[name] = self.store.lfs_entry(name, self.store.take_in(path))
        made = self.store.add_commit(parent.oid, message, tree)
        repo.refs["main"] = made.oid
        return made.oid

    def tree(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision."""
        entries = self.store.commit(self.store.repos[repo_id], revision).tree
        return {path: self.store.contents(entry).read_bytes() for path, entry in sorted(entries.items())}

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The commit of a revision."""
        return self.store.commit(self.store.repos[repo_id], revision).oid

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """A revision and what led to it, newest first; the last is the empty repo's."""
        return self.store.history(self.store.repos[repo_id], revision)

    def fault(
        self,
        match: str,
        *,
        method: str | None = None,
        status: int | None = None,
        cut: int | None = None,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        kind: FaultKind | None = None,
        stall: float = 0,
    ) -> None:
        """Let the next requests fail whose path, as in the log, matches a regular expression.

        One request meets one fault, the first that was planted. Bytes of LFS and Xet files come from
        ``/_cdn/<sha256>/<path in the repo>``, those of small files from ``/resolve/`` itself.

        Args:
            match: The expression, searched for.
            method: Only requests of this method.
            status: Answer this status.
            cut: Close the connection after so many bytes of the body.
            times: How many requests.
            headers: More headers of the answer, in place of those it would have.
            kind: ``ignore_range``: 200 and the whole body. ``wrong_range``: 206 and a range one byte off, as its
                Content-Range says. ``short``: half of the bytes, as Content-Length and Content-Range say.
                ``other_etag``: another ETag and X-Linked-ETag, by resolve. The first two wait for a Range.
                ``drip``, ``drip_headers``: a byte every twentieth of a second for a while, of the body or of all.
            stall: Seconds to wait before the answer.
        """
        more = dict(headers or {})
        if status in (429, 503):
            more = {"Retry-After": "0"} | more
        with self._lock:
            self._faults.append(Fault(re.compile(match), method, status, cut, times, more, kind, stall))

    def twist(self, match: str, change: Callable[[Any], Any]) -> None:
        """Change the JSON of every answer to a path that matches a regular expression."""
        with self._lock:
            self._twists.append((re.compile(match), change))

    def twisted(self, path: str, content: Any) -> Any:
        """JSON as it is to be sent."""
        for match, change in self._twists:
            if match.search(path) is not None:
                content = change(content)
        return content

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that a request meets."""
        with self._lock:
            for fault in self._faults:
                if fault.hits(request):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, match: str = "", method: str | None = None) -> list[Request]:
        """Those of the log whose path matches."""
        return [one for one in self.log if re.search(match, one.path) and method in (None, one.method)]

    def bytes_out(self, match: str = "") -> int:
        """How many bytes of bodies were sent for paths that match."""
        return sum(request.num_out for request in self.requests(match))

    def bytes_in(self, match: str = "") -> int:
        """How many bytes of bodies were received for paths that match."""
        return sum(request.num_in for request in self.requests(match))

    def sign_link(self) -> int:
        """A signature for a link."""
        with self._lock:
            self._signed += 1
            return self._signed

    def link_is_valid(self, signature: int) -> bool:
        """Whether a link has been handed out and not expired."""
        return self._expired < signature <= self._signed

    def expire_links(self) -> None:
        """Let every link that was handed out so far answer 403."""
        self._expired = self._signed
