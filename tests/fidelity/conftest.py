"""The trained pipeline's transformer, built in both formats once for all tests that only read it."""

from pathlib import Path

import pytest
from filelock import FileLock
from support import run_mopt
from tiny_flux1 import FOLDER


def _built(command: str, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / f"tiny-{command}"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "out").exists():
            folder.mkdir()
            made = run_mopt(command, "--preset", "flux1-dev", "--base", FOLDER, "--output", folder / "out")
            assert made.exit_code == 0, made.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def tiny_nvfp4(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Without calibration: input scales are dynamic. Never write there."""
    return _built("build-nvfp4", tmp_path_factory, worker_id)


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Likewise, in FP8."""
    return _built("convert-fp8", tmp_path_factory, worker_id)
