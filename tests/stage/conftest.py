"""Fixtures of the tests of the stage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from stage_support import Calls, record
from tracing import driver_forks


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, place: Path) -> Calls:
    """What fsops is asked, in order."""
    return record(monkeypatch, place)


@pytest.fixture(scope="session")
def driver_server() -> Iterator[Forks]:
    """The server for runs of crash_driver.py."""
    server = driver_forks()
    yield server
    server.close()
