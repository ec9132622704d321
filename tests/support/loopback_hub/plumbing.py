"""HTTP: bodies in, answers out, ranges, faults and the log. What is answered is elsewhere."""

import hashlib
import http.server
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loopback_hub.records import Fault, FaultKind, HubError, Request
from loopback_hub.xet import OWN_TOKEN

if TYPE_CHECKING:
    from loopback_hub.hub import LoopbackHub

USERS = {"hf_owner": "alice", "hf_reader": "bob"}
BLOCK = 1 << 20
_DROPS = 400
# The client asks once for the names of coding agents and keeps the answer; of no interest to any test.
AGENTS = "/api/agent-harnesses"


class Plumbing(http.server.BaseHTTPRequestHandler):
    """One connection. ``route`` answers a request through one of the ``send`` methods."""

    protocol_version = "HTTP/1.1"
    # Else the second packet of an answer waits 40 ms for the acknowledgement of the first.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr; the log is a list."""

    @property
    def hub(self) -> "LoopbackHub":
        return cast(Any, self.server).hub

    route: Callable[[str], None]  # of the class that knows the routes

    def _handle(self) -> None:
        header = self.headers.get
        self.request_log = Request(
            method=self.command,
            path=self.path,
            host=header("Host", ""),
            status=0,
            range=header("Range"),
            num_in=int(header("Content-Length", 0)),
            num_out=0,
            authorized="Authorization" in self.headers,
            user_agent=header("User-Agent", ""),
        )
        split = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))
        self._unread = self.request_log.num_in > 0 or "Transfer-Encoding" in self.headers
        self._fault: Fault | None = None
        own = header("Authorization", "") == f"Bearer {OWN_TOKEN}" or split.path == AGENTS
        if not own:
            # Before the answer: once a client has read it, a test may look.
            self.hub.log.append(self.request_log)
            self._fault = self.hub.take_fault(self.request_log)
        try:
            self._answer(split.path)
        except HubError as error:
            headers = {"X-Error-Message": error.message, "X-Request-Id": "loopback"} | error.headers
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            self.send_json({"error": error.message}, error.status, headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - names that http.server looks for

    def _answer(self, path: str) -> None:
        if self._fault is not None and self._fault.stall:
            self._wait(self._fault.stall)
        if self._fault is not None and self._fault.status is not None:
            raise HubError(self._fault.status, "planted by a test")
        self.route(path)

    def _wait(self, seconds: float) -> None:
        if self.hub.over.wait(seconds):
            raise ConnectionResetError("the test is over")

    def has_fault(self, kind: FaultKind) -> bool:
        return self._fault is not None and self._fault.kind == kind

    def user(self) -> str | None:
        """Who asks; None if nobody says so."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = USERS.get(given.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def body(self) -> bytes:
        """All of the request's body."""
        if not self._unread:
            return b""
        self._unread = False
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(self.request_log.num_in)
        received = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            received += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.request_log.num_in = len(received)
        return bytes(received)

    def body_json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def body_to(self, path: Path) -> str:
        """Write the request's body to a file and give its SHA-256."""
        self._unread = False
        digest, left = hashlib.sha256(), self.request_log.num_in
        with path.open("wb") as file:
            while left:
                block = self.rfile.read(min(BLOCK, left))
                if not block:
                    raise ConnectionResetError("the client went away")
                digest.update(block)
                file.write(block)
                left -= len(block)
        return digest.hexdigest()

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = self.hub.twisted(self.path, content)
        self.send_bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, data: bytes = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._begin(status, {"Content-Length": str(len(data)), **(headers or {})})
        self._write(data)

    def send_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        size = path.stat().st_size
        asked = None if self.has_fault("ignore_range") else self._range(size)
        low, high = asked or (0, size - 1)
        if asked and self.has_fault("wrong_range"):
            step = 1 if high + 1 < size else -1
            low, high = low + step, high + step
        if self.has_fault("short"):
            high -= (high - low + 1) // 2
        told = {"Accept-Ranges": "bytes", "Content-Length": str(high - low + 1), **headers}
        if asked:
            told["Content-Range"] = f"bytes {low}-{high}/{size}"
        self._begin(206 if asked else 200, {"Content-Type": "application/octet-stream"} | told)
        with path.open("rb") as file:
            file.seek(low)
            for start in range(low, high + 1, BLOCK):
                self._write(file.read(min(BLOCK, high + 1 - start)))

    def _range(self, size: int) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.request_log.range or "")
        if match is None or not (match[1] or match[2]):
            return None
        if match[1]:
            low, high = int(match[1]), min(int(match[2] or size - 1), size - 1)
        else:
            low, high = max(0, size - int(match[2])), size - 1
        if low >= size or high < low:
            raise HubError(416, "range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return low, high

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.body()  # an unread body would be taken for the next request on this connection
        self.request_log.status = status
        self.send_response(status)
        if self._fault is not None:
            headers = {**headers, **self._fault.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.has_fault("drip_headers"):
            self._drip(b"X-Drop: " + b"x" * _DROPS)
        self.end_headers()

    def _drip(self, data: bytes) -> None:
        """A byte now and then, and then nothing more."""
        self.flush_headers()
        for at in range(_DROPS):
            self.wfile.write(data[at : at + 1])  # where no more are left, nothing
            self._wait(0.05)
        self.connection.shutdown(2)
        raise ConnectionResetError("cut by a fault")

    def _write(self, data: bytes) -> None:
        if self.command == "HEAD" or not data:
            return
        if self.has_fault("drip"):
            self._drip(data)
        cut = self._fault.cut if self._fault is not None else None
        if cut is not None and self.request_log.num_out + len(data) > cut:
            data = data[: cut - self.request_log.num_out]
            self.request_log.num_out = cut
            self.wfile.write(data)
            self.connection.shutdown(2)
            raise ConnectionResetError("cut by a fault")
        if self.hub.line is not None:
            self.hub.line(len(data))
        # Counted first: a client that has read the last byte may look at the log at once.
        self.request_log.num_out += len(data)
        self.wfile.write(data)
