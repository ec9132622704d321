"""Fixtures of the tests of inputs on the Hub."""

import pytest

from modelopt_convert.checkpoint.hub import client, range_source


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once."""
    for module in (client, range_source):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
