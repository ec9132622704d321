"""What libraries print of themselves is kept from people, and from nobody else."""

import logging
import os
import warnings
from pathlib import Path

import pytest
from support import run_mopt

from modelopt_convert.commands.compare import CompareCommand
from modelopt_convert.run.quiet import quiet_libraries

BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


def test_libraries_are_quiet_within_and_as_before_afterwards(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BARS, "0")
    with warnings.catch_warnings(record=True) as warned, quiet_libraries():
        logging.getLogger("somebody").warning("kept")
        logging.getLogger("somebody").error("told")
        warnings.warn("kept", FutureWarning, stacklevel=1)
        assert os.environ[BARS] == "1"
    assert [one.message for one in caplog.records] == ["told"] and not warned
    assert os.environ[BARS] == "0"
    monkeypatch.delenv(BARS)
    with quiet_libraries():
        pass
    assert BARS not in os.environ
    logging.getLogger("somebody").warning("again")
    assert caplog.records[-1].message == "again"


@pytest.mark.parametrize(("more", "count"), [([], 0), (["-v"], 1)])
def test_who_asks_for_more_sees_it(
    more: list[str], count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompareCommand, "run", lambda *_: logging.getLogger("somebody").warning("a library speaks"))
    run_mopt("compare", tmp_path, "--base", tmp_path, *more)
    assert len(caplog.records) == count
