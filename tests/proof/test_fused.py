"""What one global scale for a fused weight costs, by its scales alone."""

from pathlib import Path

import pytest
import torch
from families import PRESETS
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import recorded
from support import build

from modelopt_convert.proof.fused import largest_error, rebased_error

POWERS = st.integers(-3, 0).map(lambda power: 2.0**power)


def e4m3(*shape: int, seed: int = 0) -> torch.Tensor:
    """How often there is each E4M3 code, none of them subnormal when divided by 8."""
    raw = torch.randint(64, 126, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.bincount(raw.flatten(), minlength=256)


@settings(max_examples=30, deadline=None)
@given(POWERS, POWERS, st.integers(0, 99))
def test_powers_of_two_cost_nothing_where_scales_are_rebased(one: float, other: float, seed: int) -> None:
    scales = [e4m3(8, 4, seed=seed), e4m3(4, 4, seed=seed + 1)]
    assert rebased_error(scales, [one, other]) == 0
    assert (largest_error(scales, [one, other]) == 0) == (one == other)


def test_a_rounding_costs_at_most_half_a_step_and_the_largest_scale_the_whole_ratio() -> None:
    scales = [e4m3(64, 8), e4m3(64, 8)]
    assert 0 < rebased_error(scales, [1.0, 0.9]) < 2**-4
    # All parts have the same scales: two of three are off by 0.2 of what the first one's scales are.
    assert largest_error([*scales, e4m3(64, 8)], [1.0, 0.8, 0.8]) == pytest.approx(
        (2 * 0.2**2 / (1 + 2 * 0.8**2)) ** 0.5, rel=1e-6
    )


def test_the_figure_is_what_the_engines_own_loader_shows(families: Path, tmp_path: Path) -> None:
    where = families / "hunyuan_video"
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=PRESETS["hunyuan_video"][0])
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    losses = proof["fused_losses"]
    assert losses.keys() == proof["fused_scales_differ"].keys() != set()
    shown = recorded()["sglang", "hunyuan_video", "nvfp4"]["figure"]
    assert max(one["sglang"] for one in losses.values()) == pytest.approx(shown, rel=0.2)
    assert all(one["vllm-omni"] > one["sglang"] > 0 for one in losses.values())
    [told] = [one["message"] for one in outcome.report["warnings"] if one["code"] == "engine.fused_scales"]
    assert f"{max(one['sglang'] for one in losses.values()):.1%} in sglang" in told
