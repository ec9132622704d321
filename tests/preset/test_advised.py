"""Patterns of what is kept match that and nothing else; the preset's text is a preset."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.preset.advised import advised_text, patterns_of
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import load_preset, parse_preset
from modelopt_convert.run.errors import InputError

LEAVES = ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
FREE = [f"{blocks}.{number}.{leaf}" for blocks in ("blocks", "single_blocks") for number in range(5) for leaf in LEAVES]
FREE += ["proj_in", "refiner.blocks.0.to_q", "refiner.blocks.1.to_q"]
MODULES = [*FREE, "blocks.0.norm", "x_embedder"]


@settings(max_examples=200, deadline=None)
@given(kept=st.sets(st.sampled_from(FREE)))
def test_patterns_match_what_is_kept_and_nothing_else(kept: set[str]) -> None:
    found = patterns_of(kept, FREE, MODULES)
    matcher = PatternMatcher(MODULES)
    assert {name for pattern in found for name in matcher.find(pattern) if name in FREE} == kept
    assert all(set(names) <= set(matcher.find(pattern)) for pattern, names in found.items())


def test_blocks_in_a_row_are_one_pattern_and_all_blocks_a_star() -> None:
    kept = [f"blocks.{number}.attn.to_q" for number in range(5)] + [f"blocks.{number}.ff.net.2" for number in (1, 2, 4)]
    assert list(patterns_of(kept, FREE, MODULES)) == [
        "blocks.*.attn.to_q",
        "blocks.[1:3].ff.net.2",
        "blocks.4.ff.net.2",
    ]


def test_a_name_that_no_pattern_spells_is_refused() -> None:
    with pytest.raises(InputError, match="no pattern tells it from others"):
        patterns_of(["a[0]"], ["a[0]", "a(0)"], ["a[0]", "a(0)"])


def test_the_text_is_a_preset_that_differs_in_its_quality_set_alone(tmp_path: Path) -> None:
    of = load_preset("flux1-dev")
    text = advised_text(of, "nvfp4", 'figures "so"', {"blocks.*.a": "error 1"}, ["told"], tmp_path / "mine.toml")
    found = parse_preset(text, path="mine.toml").preset
    assert found.nvfp4.quality == ["blocks.*.a"] and found.nvfp4.source == 'figures "so"'  # type: ignore[attr-defined]
    rules = of.preset.rules("nvfp4")
    assert (
        found.rules("nvfp4").model_copy(
            update={"quality": rules.quality, "source": rules.source, "status": "validated"}
        )
        == rules
    )
    assert found.model_copy(update={"name": of.preset.name, "nvfp4": rules}) == of.preset


def test_a_preset_of_ones_own_is_extended_from_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mine = tmp_path / "a" / "own.toml"
    mine.write_text('extends = "flux1-dev"\nname = "own"\n')
    text = advised_text(load_preset(str(mine)), "fp8", "x", {}, [], tmp_path / "b.toml")
    (tmp_path / "b.toml").write_text(text)
    assert load_preset(str(tmp_path / "b.toml")).preset.name == "own-advised"
