"""Fixtures. Real ModelOpt exports are made once per test run, in a process of their own, and shared by all workers.

No test reaches the real Hugging Face Hub: importing hub_support puts one on loopback in its place.

On CI a skipped test fails the run: everything that a test may need is installed there by .ci/run.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hub_support import start_afresh
from loopback_hub import LoopbackHub
from root import ROOT

# Not even collected without that, since on CI a skipped test would fail the run.
collect_ignore = [] if os.environ.get("MOPT_TEST_LONG") else ["long"]
_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        print(f"\nskipped on CI, which counts as failure: {', '.join(_skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str, name: str, *arguments: str) -> Path:
    """A folder filled by scripts/make/make_export.py, once for all workers of a run, or for all runs of mutants.py."""
    shared = tmp_path_factory.getbasetemp()
    if "MOPT_TEST_EXPORTS" in os.environ:
        shared = Path(os.environ["MOPT_TEST_EXPORTS"])
    elif worker_id != "master":
        shared = shared.parent
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not (folder / "done").exists():
            command = [sys.executable, str(ROOT / "scripts" / "make" / "make_export.py"), str(folder), *arguments]
            # ModelOpt's exporter needs transformers, which does not take a newer huggingface_hub put in front.
            variables = os.environ | ({"PYTHONPATH": ""} if "MOPT_TEST_HUB" in os.environ else {})
            subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """FLUX.1: ``base`` and every variant of make_export.py, as ModelOpt wrote them. Never write there."""
    from make_export import VARIANTS

    return _made_once(tmp_path_factory, worker_id, "exports", *VARIANTS)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with ``<family>/base``, ``/nvfp4`` and ``/fp8`` for all families. Never write there."""
    return _made_once(tmp_path_factory, worker_id, "families", "--family", "all", "nvfp4", "fp8")


@pytest.fixture(scope="session")
def built(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 in NVFP4 as mopt builds it, in several shards. Never write there."""
    from support import build

    output = tmp_path_factory.mktemp("built") / "flux"
    outcome = build(exports / "nvfp4", exports / "base", output, "--max-shard-size", "800kB")
    assert outcome.exit_code == 0, outcome.stderr
    return output


@pytest.fixture
def base(exports: Path) -> Path:
    return exports / "base"


@pytest.fixture
def nvfp4(exports: Path) -> Path:
    return exports / "nvfp4"


@pytest.fixture
def fp8(exports: Path) -> Path:
    return exports / "fp8"


@pytest.fixture
def old(fp8: Path, tmp_path: Path) -> Path:
    """The FP8 export as ModelOpt before 0.42 wrote it."""
    from fp8_support import old_export

    return old_export(fp8, tmp_path / "old")


@pytest.fixture
def good(fp8: Path) -> Path:
    """The ``.pt`` of the FP8 export."""
    from fp8_support import checkpoint_of

    return checkpoint_of(fp8)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Where an output would be made, beside what it is made from."""
    path = tmp_path / "room"
    path.mkdir()
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty Hub that knows LFS and no Xet, and an empty cache for the client."""
    return start_afresh(tmp_path, monkeypatch, "off")


@pytest.fixture
def xet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty Hub that is a Xet server too, and an empty cache for the client."""
    return start_afresh(tmp_path, monkeypatch, "http")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """OUT's parent; whatever a test does, no descriptor stays open."""
    (tmp_path / "place").mkdir()
    count = len(os.listdir("/proc/self/fd"))
    yield tmp_path / "place"
    assert len(os.listdir("/proc/self/fd")) == count


@pytest.fixture
def out(place: Path) -> Path:
    return place / "out"
