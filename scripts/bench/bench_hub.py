"""Commands with inputs on the Hub, against a plain download over the same line: how much of the line each uses.

    python scripts/bench/bench_hub.py [--gbit 1] [--folder FOLDER] [--blocks DOUBLE SINGLE] [--workers 2] [--runs N]
        [--only WORD ...]

Needs what ``full.py`` needs. The Hub is that of the tests, on loopback, in a process of its own. The bodies of its
answers come at so many bit/s, over all connections together; it adds no delay. It serves a base in BF16 and an NVFP4
export of it, FLUX.1-dev at full width with fewer blocks.

A plain download fetches the ranges that the build from both fetched, over as many connections, into a file. The start
of a command is what it takes, right before it, for a FLUX.1 of one block of each kind and an eighth of the width on a
line without a limit. A share is the bytes served, by the seconds without the start, by the limit. The bytes of one pass
are those that a build with sampled rows takes; what is beyond them is for the proof. A line is idle while it has
nothing to send, between the first byte and the last: also while a command starts.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from benching import ROOT, RUNS, Measured, machine, run_mopt, run_python
from full import NARROW, make

sys.path.append(str(ROOT / "tests" / "support"))
from loopback_hub import LoopbackHub

BLOCKS = (1, 2)
CONNECTIONS = 8
BURST_S = 0.02  # what a line that nobody used may send at once: a late thread does not cost the line
PIECE_BYTES = 16 << 20
SPEED_BYTES = 2 << 30  # are fetched to tell how fast the Hub itself is
REPOS = {"FULL": "bench/full", "SMALL": "bench/small"}
# Ranges over plain connections, each with its link; what comes is written where it belongs.
DOWNLOAD = """
import http.client, json, os, sys, tempfile, threading, urllib.parse
url, count, folder, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "keep"
jobs, lock = json.load(open(sys.argv[5]))[::-1], threading.Lock()
files = {path: tempfile.TemporaryFile(dir=folder, buffering=0) for path, _, _ in jobs}
def connect(address):
    split = urllib.parse.urlsplit(address)
    return http.client.HTTPConnection(split.hostname, split.port), f"{split.path}?{split.query}"
def link(path):
    one, place = connect(url + path)
    one.request("GET", place, headers={"Authorization": "Bearer hf_owner"})
    return one.getresponse().headers["Location"]
links = {path: link(path) for path in files}
failed = []
def work():
    buffer, open_to = bytearray(1 << 20), {}
    while True:
        with lock:
            if not jobs or failed:
                return
            path, begin, end = jobs.pop()
        try:
            if path not in open_to:
                open_to[path] = connect(links[path])
            one, place = open_to[path]
            one.request("GET", place, headers={"Range": f"bytes={begin}-{end - 1}"})
            answer = one.getresponse()
            assert answer.status == 206, answer.status
            while begin < end:
                got = answer.readinto(buffer)
                assert got, "cut"
                if keep:
                    os.pwrite(files[path].fileno(), memoryview(buffer)[:got], begin)
                begin += got
            answer.read()
        except BaseException as error:
            failed.append(error)
            raise
threads = [threading.Thread(target=work) for _ in range(count)]
for one in threads: one.start()
for one in threads: one.join()
sys.exit(bool(failed))
"""


class Line:
    """Bytes in their turn, at so many a second over all connections together."""

    def __init__(self, bytes_per_s: float) -> None:
        """Nothing has been sent."""
        self._rate, self._lock, self._free = bytes_per_s, threading.Lock(), 0.0
        self.idle = 0.0  # seconds without anything to send, between the first byte and the last

    @property
    def last(self) -> float:
        """When the last byte was sent, on the clock of ``time.monotonic``."""
        return self._free

    def begin(self) -> None:
        """Count anew."""
        self.idle, self._free = 0.0, 0.0

    def __call__(self, count: int) -> None:
        """Return once the line has sent ``count`` bytes."""
        with self._lock:
            earliest = time.monotonic() - BURST_S
            if self._free:
                self.idle += max(0.0, earliest - self._free)
            self._free = max(self._free, earliest) + count / self._rate
            wait = self._free - time.monotonic()
        if wait > 0:
            time.sleep(wait)


@dataclass(frozen=True)
class Served:
    """What the Hub sent since it was last asked.

    Attributes:
        ranges: Path in the Hub, first byte and end of each range of weights.
        bytes: Of all bodies.
        weights: Bytes of weights among them.
        twice: Those that were sent more than once.
        idle: Seconds in which a line with a limit had nothing to send, between the first byte and the last.
        last: When the last byte was sent, on the clock of ``time.monotonic``.
    """

    ranges: list[tuple[str, int, int]]
    bytes: int
    weights: int
    twice: int
    idle: float
    last: float


class Hub:
    """The loopback Hub in a process of its own, as the parent sees it."""

    def __init__(self, root: Path) -> None:
        """Start it; it is empty."""
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(root, other), daemon=True)
        self._process.start()
        self.url: str = self._pipe.recv()

    def _ask(self, *what: object) -> object:
        self._pipe.send(what)
        return self._pipe.recv()

    def seed(self, name: str, folder: Path) -> None:
        """Serve a folder."""
        self._ask("seed", name, folder)

    def limit(self, bytes_per_s: float | None) -> None:
        """Send no faster from now on; None for as fast as can be."""
        self._ask("limit", bytes_per_s)

    def served(self) -> Served:
        """What was sent since the last call."""
        found = self._ask("served")
        assert isinstance(found, Served)
        return found

    def stop(self) -> None:
        """End its process."""
        self._process.terminate()
        self._process.join()


def _serve(root: Path, pipe: Connection) -> None:
    hub = LoopbackHub(root)
    pipe.send(hub.url)
    while True:
        match pipe.recv():
            case ("seed", str(name), Path() as folder):
                pipe.send(hub.seed(name, folder))
            case ("limit", rate):
                hub.line = None if rate is None else Line(rate)
                pipe.send(None)
            case ("served",):
                pipe.send(_served(hub))
                hub.log.clear()
                if isinstance(hub.line, Line):
                    hub.line.begin()


def _served(hub: LoopbackHub) -> Served:
    places = {entry.sha256: f"/{name}/resolve/main/{path}" for name, repo in hub.store.repos.items()
              for path, entry in hub.store.commit(repo, "main").tree.items()}  # fmt: skip
    ranges = []
    for one in hub.requests("/_cdn/", "GET"):
        sha256 = one.path.split("/")[2]
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", one.range or "")
        begin = int(found[1]) if found else 0
        ranges.append((places[sha256], begin, begin + one.num_out))
    twice, last = 0, ("", 0)
    for path, begin, end in sorted(ranges):
        before = last[1] if path == last[0] else 0
        twice += max(0, min(before, end) - begin)
        last = (path, max(before, end))
    idle, last_sent = (hub.line.idle, hub.line.last) if isinstance(hub.line, Line) else (0.0, 0.0)
    return Served(ranges, hub.bytes_out(), hub.bytes_out("/_cdn/"), twice, idle, last_sent)


@dataclass(frozen=True)
class Case:
    """One command; BASE and EXPORT are addresses on the Hub, BUILT and OUT folders."""

    name: str
    arguments: tuple[str, ...]
    written: str | None = None


_FROM_BASE = ("build-nvfp4", "--preset", "flux1-dev", "--base", "BASE")
_FROM_BOTH = (*_FROM_BASE, "--export", "EXPORT")
CASES = (
    Case("build from an export, closing verify", (*_FROM_BOTH, "--output", "BUILT", "--verify", "cpu"), "BUILT"),
    Case("the same, `--verify off`", (*_FROM_BOTH, "--output", "OUT", "--verify", "off"), "OUT"),
    Case("quantize the base, closing verify", (*_FROM_BASE, "--output", "OUT", "--verify", "cpu"), "OUT"),
    Case("verify OUT --base", ("verify", "BUILT", "--base", "BASE", "--device", "cpu")),
)  # fmt: skip
ONE_PASS = Case("", (*_FROM_BOTH, "--output", "OUT", "--verify", "off", "--proof", "sampled"), "OUT")
DOWNLOADED = "plain download of the ranges of the first"


@dataclass
class Result:
    """Of one command.

    Attributes:
        starts: Seconds of the small run before each run.
        seconds: Of each run, the start included.
        shares: Of the line, of each run.
        loads: Load average of the machine at the end of each run.
        idles: Seconds of each run in which the line had nothing to send, between the first byte and the last.
        tails: Seconds of each run from the last byte to the end, the sync of what was written included.
        phases: Seconds of each phase of the last run, by the command's own clock.
        served: What the Hub sent in the last run.
    """

    starts: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    idles: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    served: Served | None = None

    def add(self, start: float, seconds: float, served: Served, rate: float) -> str:
        """One more run; what is to be said of it."""
        self.starts.append(start)
        self.seconds.append(seconds)
        self.shares.append(served.bytes / (seconds - start) / rate)
        self.loads.append(os.getloadavg()[0])
        self.idles.append(served.idle)
        self.tails.append(time.monotonic() - served.last)
        self.served = served
        done = f"{seconds:.2f} s with {start:.2f} s of start, {served.bytes / 1e9:.3f} GB"
        done = f"{done}, {self.shares[-1]:.3f} of the line"
        return f"{done}, idle {self.idles[-1]:.2f} s, after the last byte {self.tails[-1]:.2f} s"


class Bench:
    """Runs commands against a Hub."""

    def __init__(self, folder: Path, hub: Hub, workers: int) -> None:
        """Outputs and what is fetched lie in the folder."""
        self._folder, self._hub, self._workers = folder, hub, workers
        for size in REPOS:
            (folder / size).mkdir()

    def mopt(self, case: Case, size: str) -> tuple[Measured, Served]:
        """One run, with FULL or SMALL inputs; what it wrote before is gone."""
        if case.written is not None:
            shutil.rmtree(self._folder / size / case.written, ignore_errors=True)
        os.sync()
        words = [self._word(one, size) for one in case.arguments]
        self._hub.served()
        done = run_mopt(*words, "--workers", str(self._workers))
        return done, self._hub.served()

    def _word(self, word: str, size: str) -> str:
        if word in ("BASE", "EXPORT"):
            return f"hf://{REPOS[size]}-{word.lower()}"
        return str(self._folder / size / word) if word in ("BUILT", "OUT") else word

    def download(self, ranges: Sequence[tuple[str, int, int]], *, keep: bool = True) -> tuple[float, Served]:
        """A plain download of ranges."""
        listed = self._folder / "ranges.json"
        listed.write_text(json.dumps(ranges))
        words = [self._hub.url, str(CONNECTIONS), str(self._folder), "keep" if keep else "drop", str(listed)]
        os.sync()
        self._hub.served()
        done = run_python(DOWNLOAD, words)
        return done.seconds, self._hub.served()


@dataclass(frozen=True)
class Found:
    """All that was measured.

    Attributes:
        results: By the command's name.
        one_pass: Bytes of weights that a build with sampled rows takes.
        speed: Of the Hub without a limit, in bytes a second.
    """

    results: dict[str, Result]
    one_pass: int
    speed: float


def measure(bench: Bench, hub: Hub, chosen: Sequence[Case], rate: float, runs: int) -> Found:
    """Run everything, in turns; what was done is said on stderr."""
    results = {DOWNLOADED: Result()}
    for case in chosen:
        bench.mopt(case, "SMALL")  # fills caches of bytecode and pages
        results[case.name] = Result()
    _, one_pass = bench.mopt(ONE_PASS, "FULL")
    _, first = bench.mopt(CASES[0], "FULL")
    speed = _speed(bench, first)
    _say(f"the Hub without a limit: {speed / 1e9:.2f} GB/s, {speed / rate:.1f} times the line")
    for _ in range(runs):
        start, _ = bench.download([])
        hub.limit(rate)
        seconds, served = bench.download(first.ranges)
        _say(f"{DOWNLOADED}: {results[DOWNLOADED].add(start, seconds, served, rate)}")
        for case in chosen:
            hub.limit(None)
            start = bench.mopt(case, "SMALL")[0].seconds
            hub.limit(rate)
            done, served = bench.mopt(case, "FULL")
            results[case.name].phases = json.loads(done.printed)["timings_s"]
            _say(f"{case.name}: {results[case.name].add(start, done.seconds, served, rate)}")
        hub.limit(None)
    return Found(results, one_pass.weights, speed)


def _speed(bench: Bench, served: Served) -> float:
    """Bytes a second of plain requests for pieces of the largest file, which are not kept."""
    path, _, size = max(served.ranges, key=lambda one: one[2])
    pieces = [(path, begin, min(begin + PIECE_BYTES, size)) for begin in range(0, size, PIECE_BYTES)]
    pieces *= SPEED_BYTES // size + 1
    seconds, sent = bench.download(pieces, keep=False)
    return sent.bytes / (seconds - bench.download([])[0])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(found: Found, gbit: float) -> list[str]:
    """One row for every command."""
    columns = (
        "command", "GB", "s", "of them start, s", "share of the line", "beyond one pass, GB", "twice, GB", "idle, s",
        "after the last byte, s", "of which, s", "load",
    )  # fmt: skip
    rows: list[Sequence[object]] = [columns, ["---"] * len(columns)]
    for name, one in found.results.items():
        if one.served is None:
            continue
        rows.append(
            (
                name,
                f"{one.served.bytes / 1e9:.3f}",
                *(f"{statistics.median(values):.2f}" for values in (one.seconds, one.starts, one.shares)),
                f"{(one.served.weights - found.one_pass) / 1e9:.3f}" if name in (CASES[0].name, CASES[1].name) else "",
                f"{one.served.twice / 1e9:.3f}",
                *(f"{statistics.median(values):.2f}" for values in (one.idles, one.tails)),
                ", ".join(f"{phase} {value:.1f}" for phase, value in one.phases.items() if value >= 0.1),
                f"{statistics.median(one.loads):.1f}",
            )
        )
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [*lines, "", f"A line of {gbit:g} Gbit/s; the Hub itself reaches {8 * found.speed / 1e9:.1f}. {machine()}."]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbit", type=float, default=1, help="of the line (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where inputs are made, and kept; default: a temporary folder")
    parser.add_argument("--blocks", type=int, nargs=2, default=BLOCKS, help="double and single (default 1 2)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--only", nargs="+", default=(), help="commands whose names have one of these words in them")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, medians are taken (default %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mopt-inputs-"))
    room = Path(tempfile.mkdtemp(prefix="mopt-hub-", dir=folder))
    blocks = (arguments.blocks[0], arguments.blocks[1])
    inputs = {"FULL": folder / "full-{}-{}".format(*blocks), "SMALL": folder / "small"}
    chosen = [one for one in CASES if not arguments.only or any(word in one.name for word in arguments.only)]
    hub = Hub(room / "hub")
    try:
        make(inputs["SMALL"], (1, 1), NARROW)
        make(inputs["FULL"], blocks)
        for size, path in inputs.items():
            for name in ("BASE", "EXPORT"):
                hub.seed(f"{REPOS[size]}-{name.lower()}", path / name)
        _take_over(hub, room)
        found = measure(Bench(room, hub, arguments.workers), hub, chosen, arguments.gbit * 1e9 / 8, arguments.runs)
    finally:
        hub.stop()
        shutil.rmtree(room if arguments.folder else folder)
    print("\n".join(["", *table(found, arguments.gbit), ""]))


def _take_over(hub: Hub, room: Path) -> None:
    """Have everything that is run ask this Hub, with a cache of its own."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_owner", "HF_HOME": str(room / "home")}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}


if __name__ == "__main__":
    main()
