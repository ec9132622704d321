"""A layout and the config keys that declare it say the same."""

import pytest

from modelopt_convert.formats.layout import Layout, NibbleOrder, ScaleOrder, declared_layout


@pytest.mark.parametrize("nibbles", ["low", "high", "undetermined"])
@pytest.mark.parametrize("scales", ["linear", "128x4", "undetermined"])
def test_what_is_declared_is_read_back(nibbles: NibbleOrder, scales: ScaleOrder) -> None:
    """And nothing is declared that is undetermined."""
    layout = Layout(nibbles, scales, "undetermined")
    keys = layout.config_keys()
    assert declared_layout(keys) == layout
    assert len(keys) == (nibbles != "undetermined") + (scales != "undetermined")
