"""Fixtures of the tests of the stage."""

from pathlib import Path

import pytest
from stage_support import Calls, record


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, place: Path) -> Calls:
    """What fsops is asked, in order."""
    return record(monkeypatch, place)
