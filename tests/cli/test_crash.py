"""The real commands, killed, interrupted and starved while it replaces a checkpoint made from a real export."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest
from commands import CONVERSIONS, words_of
from figures import note
from hub_support import hub_environment
from loopback_hub import LoopbackHub
from root import LONG
from support import tree
from tracing import DRIVER, OPENING, Call, Ended, calls_under, fork, mopt_forks, need_strace, run, strike

PARTS = 3  # of the points of the kill test, so that they spread over the workers
ENVIRONMENT = os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
MOPT = "from modelopt_convert.cli import main; main()"


# A build of each kind, and conversions: one that moves bytes alone, one that decodes.
KINDS = ("one transformer", "two transformers", "hf", *CONVERSIONS)


class Site:
    """A folder with OUT, an older build in several shards; a run with ``arguments`` replaces it by one in one file."""

    def __init__(self, exports: Path, top: Path, kind: str) -> None:
        self.kind = kind
        self.place = top / "place"
        self.out = self.place / "out"
        self.log = top / "log"
        self.environment = ENVIRONMENT
        self._old = top / "old"
        inputs = [exports / "nvfp4", exports / "base"]
        if kind == "two transformers":
            inputs = [self._twice(one, top / "inputs" / one.name) for one in (exports / "nvfp4", exports / "base")]
        if kind == "hf":
            hub = LoopbackHub(top / "hub")
            for name in ("nvfp4", "base"):
                hub.seed(f"alice/{name}", exports / name)
            self.environment = ENVIRONMENT | hub_environment(hub)
            inputs = ["hf://alice/nvfp4", "hf://alice/base"]  # type: ignore[list-item]
        self.forks = mopt_forks(self.environment)
        self._command = kind if kind in CONVERSIONS else "build-nvfp4"
        self._inputs = dict(zip(("nvfp4", "base"), inputs, strict=True))
        for folder, more in ((self._old, ["--max-shard-size", "1MB"]), (top / "new", [])):
            self.arguments = [*self._words(folder), *more]
            assert fork(self.forks, self.arguments).code == 0
        self.old, self.new = tree(self._old), tree(top / "new")
        assert self.old.keys() != self.new.keys()
        self.arguments = [*self._words(self.out), "--overwrite"]

    def _words(self, out: Path) -> list[str]:
        # strace counts the calls of the first thread alone
        return [*words_of(self._command, self._inputs | {"out": out}), "--json", "--workers", "1"]

    @staticmethod
    def _twice(source: Path, pipeline: Path) -> Path:
        for name in ("transformer", "transformer_2"):
            shutil.copytree(source / "transformer", pipeline / name)
        return pipeline

    def run(self, first: str) -> Ended:
        """In a process of its own, in which some code runs before."""
        return run([sys.executable, "-c", first + MOPT, *self.arguments], self.environment)

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self._old, self.out)

    def state(self) -> str:
        found = tree(self.out)
        assert found in (self.old, self.new), f"OUT is torn: {sorted(found)}"
        return "old" if found == self.old else "new"

    def litter(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir() if path != self.out)

    @cached_property
    def calls(self) -> list[Call]:
        """Every changing call of an undisturbed run; opening is left out, since imports open files too."""
        self.reset()
        ended, found = calls_under(self.forks, self.arguments, self.place, self.log)
        assert (ended.code, self.state(), self.litter()) == (0, "new", [])
        # What is fetched from a Hub is written into a cache, too, in pieces that depend on time.
        left_out = (*OPENING, "pwrite64") if self.kind == "hf" else OPENING
        return [call for call in found if call.changes and call.name not in left_out]

    def strike(self, call: Call, fault: str) -> Ended:
        self.reset()
        return strike(self.forks, self.arguments, call, fault, self.place, self.log)


@pytest.fixture(scope="module")
def site_of(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """The site of a kind, one for all tests."""
    need_strace()
    sites: dict[str, Site] = {}

    def made(kind: str) -> Site:
        if kind not in sites:
            sites[kind] = Site(exports, tmp_path_factory.mktemp("site"), kind)
        return sites[kind]

    yield made
    for site in sites.values():
        site.forks.close()


@pytest.fixture(params=KINDS[:1])
def site(request: pytest.FixtureRequest, site_of: Callable[[str], Site]) -> Site:
    return site_of(request.param)


@pytest.fixture
def calls(site: Site) -> list[Call]:
    return site.calls


def spread(calls: list[Call]) -> list[Call]:
    """First, middle and last of each kind of call, in the order of the run."""
    chosen: set[Call] = set()
    for name in {call.name for call in calls}:
        same = [call for call in calls if call.name == name]
        chosen |= {same[0], same[len(same) // 2], same[-1]}
    return sorted(chosen, key=calls.index)


def middle_write(calls: list[Call]) -> Call:
    writes = [call for call in calls if call.name == "pwrite64"]
    return writes[len(writes) // 2]


@pytest.mark.parametrize(
    ("site", "part"),
    [(KINDS[0], part) for part in range(PARTS)] + [(kind, 0) for kind in KINDS[1:] if LONG or kind != "hf"],
    indirect=["site"],
)
def test_killed(site: Site, calls: list[Call], part: int) -> None:
    """What is only in other folders, or elsewhere, goes through the same calls.

    In every run a share of the points of two transformers and of conversions; with ``make test-long`` inputs on a Hub,
    and all points.
    """
    counts: Counter[str] = Counter()
    points = spread(calls)
    assert len(points) >= 10
    step = PARTS if site.kind == KINDS[0] else 1 if LONG else len(points) // 2
    for call in points[part::step]:
        assert site.strike(call, "signal=KILL").code == -9
        counts[f"{call.name}: {site.state()}"] += 1
    print(f"\nSIGKILL, {site.kind}: {counts.total()} of {len(points)} points, OUT afterwards {dict(counts)}")
    ended = fork(site.forks, site.arguments)
    assert (ended.code, site.state(), site.litter()) == (0, "new", [])
    note(8, cases=counts.total(), torn=0, litter=0)


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_interrupted_while_it_writes(site: Site, calls: list[Call], name: str, code: int) -> None:
    ended = site.strike(middle_write(calls), f"signal={name}")
    assert ended.code == code
    assert (site.state(), site.litter()) == ("old", [])
    assert (ended.told["status"], ended.told["exit_code"]) == ("interrupted", code)
    assert ended.told["output"]["published"] is False


@pytest.mark.parametrize("whom", ["the main thread", "the process"])
def test_interrupted_at_the_swap(site: Site, calls: list[Call], whom: str) -> None:
    """It ends with the new checkpoint in place, and says so; whichever of the threads of numpy and torch got it."""
    if whom == "the process":
        site.reset()
        first = f"import sys; sys.path.append({str(DRIVER.parent)!r}); import crash_driver as d; "
        ended = site.run(first + "d.signal_after('exchange'); ")
    else:
        ended = site.strike(next(call for call in calls if "rename" in call.name), "signal=TERM")
    assert (site.state(), site.litter()) == ("new", [])
    assert ended.code == 143
    assert ended.told["status"] == "interrupted"
    assert ended.told["output"]["published"] is True


@pytest.mark.parametrize(
    ("site", "call", "error", "code"),
    [
        (kind, *fault)
        for kind in (KINDS if LONG else (KINDS[0], *CONVERSIONS))
        for fault in (
            ("fallocate", "ENOSPC", "storage.no_space"),
            ("pwrite64", "EIO", "storage.failed"),
            ("fsync", "EIO", "storage.failed"),
        )
        if (kind, fault[0]) != ("hf", "pwrite64")  # see calls
    ],
    indirect=["site"],
)
def test_the_disk_says_no(site: Site, calls: list[Call], call: str, error: str, code: str) -> None:
    """A full or broken disk is not a bug of mopt: exit 5, with the path, the errno and what to do."""
    chosen = middle_write(calls) if call == "pwrite64" else next(one for one in calls if one.name == call)
    ended = site.strike(chosen, f"error={error}")
    assert (site.state(), site.litter()) == ("old", [])
    assert ended.code == 5, ended.told["error"]
    assert ended.told["error"]["code"] == code
    assert str(site.place) in ended.told["error"]["message"] and error in ended.told["error"]["message"]
    assert ended.told["error"]["hint"] and "Traceback" not in ended.stderr
