"""Inputs on the Hub under what real networks, caches and signals do to them."""

from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from support import run_mopt

from modelopt_convert.hub import client, range_source


@pytest.fixture(params=["hub", "xet_hub"])
def filled(request: pytest.FixtureRequest, base: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    hub: LoopbackHub = request.getfixturevalue(request.param)
    hub.seed("alice/base", base)
    for module in (client, range_source):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    return hub


def test_what_was_downloaded_is_read_wherever_the_cache_keeps_it(filled: LoopbackHub, tmp_path: Path) -> None:
    """Newer clients keep one copy of a Xet file for all repos, outside the folder of any."""
    assert run_mopt("inspect", "hf://alice/base", "--download").exit_code == 0
    filled.log.clear()
    outcome = run_mopt("inspect", "hf://alice/base")
    assert outcome.exit_code == 0 and not filled.requests("/_cdn/|/cas/"), outcome.stderr
    snapshot = tmp_path / "_home" / "hub" / "models--alice--base" / "snapshots" / filled.head("alice/base")
    assert run_mopt("inspect", snapshot).exit_code == 0
