"""Fixtures. What is only read is made once per test run and shared by all workers: real exports, and builds of them.

No test reaches the real Hugging Face Hub: importing hub_support puts one on loopback in its place.

On CI a skipped test fails the run: everything that a test may need is installed there by .ci/run.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from hub_support import start_afresh
from loopback_hub import LoopbackHub
from root import LONG, ROOT

# Hints name `hf` as it is called where it is on PATH, as in an environment that was activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of torch that wait for each other would take a third of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup; what they start does not
# Not even collected without that, since on CI a skipped test would fail the run.
collect_ignore = [] if LONG else ["long"]
_skipped: list[str] = []
# Begun first: who begins one of them last leaves the other worker with nothing to do.
_LONGEST = ("test_ray_cluster.py", "test_loaders.py", "test_triton.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)


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


def _shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this run see."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


def _made_once(folder: Path, make: Callable[[], object]) -> Path:
    """A folder that the first worker to ask for it fills."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "done").exists():
            make()
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def make_exports(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Runs scripts/make/make_export.py in a process of its own; once for all runs with one MOPT_TEST_EXPORTS."""
    given = os.environ.get("MOPT_TEST_EXPORTS")
    shared = Path(given) if given else _shared(tmp_path_factory, worker_id)

    def made(name: str, *arguments: str) -> Path:
        command = [sys.executable, str(ROOT / "scripts" / "make" / "make_export.py"), str(shared / name), *arguments]
        # ModelOpt's exporter needs transformers, which does not take a newer huggingface_hub put in front.
        variables = os.environ | ({"PYTHONPATH": ""} if "MOPT_TEST_HUB" in os.environ else {})
        run = partial(subprocess.run, command, check=True, capture_output=True, text=True, env=variables)
        return _made_once(shared / name, run)

    return made


@pytest.fixture(scope="session")
def exports(make_exports: Callable[..., Path]) -> Path:
    """FLUX.1: ``base`` and every variant of make_export.py, as ModelOpt wrote them. Never write there."""
    return make_exports("exports", "all")


@pytest.fixture(scope="session")
def transformed_exports(make_exports: Callable[..., Path]) -> Path:
    """FLUX.1: ``base``, ``nvfp4_awq`` and ``nvfp4_svd``. Never write there."""
    return make_exports("transformed", "nvfp4_awq", "nvfp4_svd")


@pytest.fixture(scope="session")
def families(make_exports: Callable[..., Path]) -> Path:
    """A folder with ``<family>/base``, ``/nvfp4`` and ``/fp8`` for all families. Never write there."""
    return make_exports("families", "--family", "all", "nvfp4", "fp8")


@pytest.fixture(scope="session")
def make_build(exports: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Builds FLUX.1 from its exports."""
    from support import run_mopt

    def made(name: str, command: str, export: str | None, *more: str) -> Path:
        folder = _shared(tmp_path_factory, worker_id) / name
        inputs = ["--base", exports / "base", *([] if export is None else ["--export", exports / export])]

        def make() -> None:
            folder.mkdir()
            outcome = run_mopt(command, "--preset", "flux1-dev", *inputs, "--output", folder / "out", *more)
            assert outcome.exit_code == 0, outcome.stderr

        return _made_once(folder, make) / "out"

    return made


@pytest.fixture(scope="session")
def built(make_build: Callable[..., Path]) -> Path:
    """FLUX.1 in NVFP4 as its publisher builds it, in several shards. Never write there, nor into those that follow."""
    claim = ("--base-model", "black-forest-labs/FLUX.1-dev")
    return make_build("built", "build-nvfp4", "nvfp4", "--max-shard-size", "800kB", *claim)


@pytest.fixture(scope="session")
def built_nvfp4(make_build: Callable[..., Path]) -> Path:
    """The same in one file."""
    return make_build("built-nvfp4", "build-nvfp4", "nvfp4")


@pytest.fixture(scope="session")
def built_fp8(make_build: Callable[..., Path]) -> Path:
    """FLUX.1 in FP8 as mopt converts it."""
    return make_build("built-fp8", "convert-fp8", "fp8")


@pytest.fixture(scope="session")
def built_uncalibrated(make_build: Callable[..., Path]) -> Path:
    """FLUX.1 in NVFP4, quantized by mopt from the base."""
    return make_build("built-uncalibrated", "build-nvfp4", None)


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """What ``mopt calibrate`` writes of the tiny pipeline, in one run from beginning to end."""
    from calibrated import calibrate

    def make() -> None:
        assert calibrate(folder / "calib").exit_code == 0

    folder = _shared(tmp_path_factory, worker_id) / "calibrated"
    folder.mkdir(exist_ok=True)
    return _made_once(folder, make) / "calib"


@pytest.fixture(scope="session")
def calib_gptq(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The same with what GPTQ needs."""
    from calibrated import calibrate

    def make() -> None:
        assert calibrate(folder / "calib", "--gptq").exit_code == 0

    folder = _shared(tmp_path_factory, worker_id) / "calibrated-gptq"
    folder.mkdir(exist_ok=True)
    return _made_once(folder, make) / "calib"


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


@pytest.fixture(params=["hub", "xet_hub"])
def any_hub(request: pytest.FixtureRequest) -> LoopbackHub:
    """An empty Hub of either kind."""
    return request.getfixturevalue(request.param)


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
