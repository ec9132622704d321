"""A calibration of the tiny pipeline, made once for all tests that only read it."""

from pathlib import Path

import pytest
from calibrated import calibrate
from filelock import FileLock


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """CALIB, in one run from beginning to end."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "calibrated"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "calib").exists():
            folder.mkdir()
            made = calibrate(folder / "calib")
            assert made.exit_code == 0, made.stderr
    return folder / "calib"
