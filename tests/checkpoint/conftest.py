"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest
from checkpoint_folders import SHARDS, WEIGHT_MAP, write


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small checkpoint in three shards, with its index."""
    return write(tmp_path / "checkpoint", SHARDS, WEIGHT_MAP)
