"""Units of every family: any choice of them is a build, of exactly the bytes that were foretold."""

import random
from pathlib import Path

import pytest

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.fidelity.units import choices_of
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.plan import Keeps
from modelopt_convert.preset.advised import advised_text, patterns_of
from modelopt_convert.preset.patterns import siblings
from modelopt_convert.preset.preset import load_preset, parse_preset, preset_of_class

_SHARD = 10**9


@pytest.mark.parametrize("algorithm", FORMATS)
def test_any_choice_of_units_is_a_build_of_the_bytes_foretold(families: Path, algorithm: Algorithm) -> None:
    """FLUX.1 and 18 others: names come from the plan and the preset, none from a family."""
    looked = 0
    for folder in sorted(one for one in families.iterdir() if (one / "base").is_dir()):
        (config,) = (folder / "base").rglob("config.json")
        with CheckpointReader(config.parent, need_config=True) as base:
            preset = preset_of_class(base.config)
            if preset is None or algorithm not in preset.sets() or not preset.fits(base.config):
                continue
            looked += 1
            loaded, target = load_preset(preset.name), FORMATS[algorithm]
            choices = choices_of(target, base, preset)
            members = [name for unit in choices.units for name in unit.members]
            assert sorted(members) == sorted(choices.plan.packed), folder
            assert set(members).isdisjoint(choices.structural)
            for group in siblings(preset.fused, members):
                assert any(set(group) <= set(unit.members) for unit in choices.units), (folder, group)
            for seed in range(3):
                kept = random.Random(seed).sample(choices.units, len(choices.units) // 2)
                names = [name for unit in kept for name in unit.members]
                found = patterns_of(names, choices.plan.packed, list(dict.fromkeys(map(module_of, base.tensors))))
                patterns = dict.fromkeys(found, "kept")
                text = advised_text(loaded, algorithm, "a test", patterns, [], folder / "mine.toml")
                mine = parse_preset(text, path="mine.toml").preset
                plan = plan_quantized(target, base, Keeps(mine, mine.rules(algorithm), ()), max_shard_size=_SHARD)
                assert set(plan.packed) == set(members) - set(names), folder
                cost = sum(unit.bytes_kept - unit.bytes_packed for unit in kept)
                assert plan.total_bytes == choices.least_bytes + cost, folder
            assert choices.bits(choices.most_bytes) == 16
            assert choices.bytes_of_bits(choices.bits(choices.least_bytes)) in range(
                choices.least_bytes - 1, choices.least_bytes + 1
            )
    assert looked >= 12
