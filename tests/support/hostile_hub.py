"""A Hub that lies: every field of its answers in turn, and what must hold of mopt whatever it says."""

import copy
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from figures import note
from loopback_hub import LoopbackHub
from root import LONG
from support import Outcome, run_mopt, tree

DOCUMENTED = frozenset(range(8))  # and not 70: what a Hub says is no bug of mopt's
SECONDS = 60.0  # one command, on a machine that does other things too; the limits within are shrunk to less
GONE = object()
HUGE = 10**300

# Of any JSON field. "{out}" becomes a path that nobody may write to.
# Of all lies so many are told in every run, another share to each field; all with MOPT_TEST_LONG.
_STEP = 1 if LONG else 6


def share(lies: Iterable[Any], *of: object) -> list[Any]:
    """Those that this run tells of one thing, at least one."""
    told = list(lies)
    return told[zlib.crc32(repr(of).encode()) % min(_STEP, len(told)) :: _STEP]


VALUES: dict[str, Any] = {
    "gone": GONE,
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "huge": HUGE,
    "fraction": 1.5,
    "nan": float("nan"),
    "empty": "",
    "up": "../../../../../../escaped",
    "up2": "a/../../../../../escaped",
    "absolute": "{out}/escaped",
    "file": "file://{out}/escaped",
    "local": "local://{out}/escaped",
    "backslash": "..\\..\\escaped",
    "nul": "a\0b",
    "newline": "a\nError: b\x1b[31m",
    "surrogate": "a\ud800b",
    "separator": "a\u2028b",
    "long": "x" * 5000,
    "deep": "a/" * 2000 + "b",
    "dot": ".",
    "list": [],
    "list of text": ["x"],
    "list of null": [None],
    "object": {},
    "object in object": {"oid": {}, "size": [], "name": 3},
    "zeros": "0" * 40,
    "long zeros": "0" * 64,
}
FEW = ("null", "huge", "up", "local", "list", "object")

# Of any header.
HEADERS: dict[str, str] = {
    "empty": "",
    "word": "x",
    "negative": "-1",
    "digits": "9" * 5000,
    "huge": "9" * 18,
    "up": "../../../../../../escaped",
    "absolute": "{out}/escaped",
    "file": "file://{out}/escaped",
    "quoted up": '"../../../../../../escaped"',
    "zeros": "0" * 40,
    "bytes": "bytes 0-0/1",
    "brackets": "http://[::1",
    "control": "\x1b[31m",
    "latin": "\xe9\xff",
    "link": '<http://127.0.0.1:9/x>; rel="next", <http://127.0.0.1:9/y>; rel="xet-auth"',
    "gzip": "gzip",
}


def put(content: Any, field: Sequence[str | int], value: Any) -> Any:
    """JSON with another value in one place; as it was where there is no such place."""
    if not field:
        return content if value is GONE else value
    changed = copy.deepcopy(content)
    inside = changed
    try:
        for step in field[:-1]:
            inside = inside[step]
        if value is GONE:
            del inside[field[-1]]
        else:
            inside[field[-1]] = value
    except (LookupError, TypeError):
        return content
    return changed


class Lies:
    """Tells them, and holds mopt to what it promises."""

    def __init__(self, hub: LoopbackHub, outside: Path) -> None:
        """Nothing may come to be in ``outside`` but in the Hub, in the cache, and in ``out``."""
        self.hub = hub
        self.outside = outside
        self.cases = 0

    def json(self, match: str, field: Sequence[str | int], value: Any, run: Callable[[], Outcome]) -> None:
        """One command, with one field of every answer to a path changed."""
        said = value.replace("{out}", str(self.outside)) if isinstance(value, str) else value
        self.hub._twists.clear()
        self.hub.twist(match, lambda content: put(content, field, said))
        self.hold(run)
        self.hub._twists.clear()

    def header(self, match: str, name: str, value: str, run: Callable[[], Outcome], status: int | None = None) -> None:
        """One command, with one header of every answer to a path changed."""
        self.hub._faults.clear()
        more = {name: value.replace("{out}", str(self.outside))}
        self.hub.fault(match, headers=more, times=10_000, status=status)
        self.hold(run)
        self.hub._faults.clear()

    def hold(self, run: Callable[[], Outcome]) -> Outcome:
        """Run it: documented, one line, in time, and nothing written where it must not be."""
        before, begun = self._seen(), time.monotonic()
        outcome = run()
        self.cases += 1
        note(23, lies=1)
        assert time.monotonic() - begun < SECONDS
        assert outcome.exit_code in DOCUMENTED, outcome.stdout + outcome.stderr
        assert "Traceback" not in outcome.stdout + outcome.stderr
        assert self._seen() == before
        assert not [path for path in self._caches() if not path.resolve().is_relative_to(self.outside / "_home")]
        if outcome.exit_code:
            assert outcome.report is not None and outcome.report["error"] is not None, outcome.stderr
            said = outcome.report["error"]
            line = said["message"] + (said["hint"] or "")
            assert "hf://" in line or "http" in line, line
            assert not [char for char in line if ord(char) < 32 or char in "\x7f\u2028\u2029"], ascii(line)
            assert len(said["message"]) < 1500
        return outcome

    def _seen(self) -> dict[str, str]:
        return {
            name: digest
            for name, digest in tree(self.outside).items()
            if name.partition("/")[0] not in ("_home", "_hub", "out")
        }

    def _caches(self) -> list[Path]:
        return list((self.outside / "_home").rglob("*"))


def inspect(*more: str) -> Outcome:
    """``mopt inspect`` of the base."""
    return run_mopt("inspect", "hf://alice/base", *more)


@contextmanager
def elsewhere() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server on the Hub's host that is not the Hub: its port, and the headers of all that it hears."""
    heard: list[dict[str, str]] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def answer(self) -> None:
            heard.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            """Not to stderr."""

    for method in ("do_GET", "do_HEAD", "do_POST", "do_PUT"):
        setattr(Elsewhere, method, Elsewhere.answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, heard
    finally:
        server.shutdown()
        server.server_close()
