"""config.json of two sides: other values are another model's, a key that one side alone has is told."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from faults import small_pair, swapped
from support import Outcome, build, config_of, edit, run_mopt
from verify_support import found, verify

from modelopt_convert.plan.inputs import differing_keys, one_sided_words

SHAPES = {"blocks.0.ff": (64, 32), "blocks.1.ff": (48, 64)}
ARCHITECTURE: dict[str, Any] = {
    "num_layers": 2,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
    "rope": {"scale": None, "theta": 1e4},
    "norm_eps": 1e-6,
    "patch_size": None,
}
OTHER: dict[str, Any] = {
    "num_layers": 3,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56],
    "rope": {"theta": 1e4, "scale": 2},
    "norm_eps": 1e-5,
    "patch_size": 2,
}
UNTOLD = {"_diffusers_version": "0.30.0", "_name_or_path": "somewhere", "_internal": 7}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small export and its base, both with an architecture. Never write there."""
    room = tmp_path_factory.mktemp("configs")
    sides = small_pair(room, SHAPES)
    for one in sides:
        (one / "config.json").write_text(json.dumps(config_of(one) | ARCHITECTURE))
    return sides


def without(folder: Path, room: Path, keys: list[str], more: dict[str, Any]) -> Path:
    def change(config: dict[str, Any]) -> None:
        for key in keys:
            del config[key]
        config.update(more)

    return edit(folder, room / folder.name, change_config=change)


def built(export: Path, base: Path, out: Path, *more: str) -> Outcome:
    return build(export, base, out, *more, preset="none")


def warned(outcome: Outcome) -> list[str]:
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return [one["message"] for one in outcome.report["warnings"] if one["code"] == "config.one_sided"]


def container(outcome: Outcome) -> dict[str, Any]:
    (level,) = [one for one in found(outcome)["levels"] if one["level"] == "L0"]
    return level


@pytest.mark.parametrize("seed", range(6))
def test_keys_of_one_side_are_told_with_their_values(seed: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In builds, also planned ones, and in verify; both sides may lack some."""
    source = random.Random(seed)
    keys = source.sample(list(ARCHITECTURE), len(ARCHITECTURE))
    of_base, of_export = sorted(keys[: seed % 3]), sorted(keys[3 : 3 + (seed + 1) % 3])
    untold = dict(source.sample(list(UNTOLD.items()), 2))
    export, base = without(pair[0], tmp_path, of_base, untold), without(pair[1], tmp_path, of_export, {})
    expected = [
        f"only {side} has {', '.join(f'{key} = {ARCHITECTURE[key]!r}' for key in keys)}"
        for side, keys in (("the export", of_export), ("the base", of_base))
        if keys
    ]
    for more in (("--dry-run",), ()):
        outcome = built(export, base, tmp_path / "out", *more)
        told = warned(outcome)
        assert len(told) == bool(expected)
        for words in told:
            assert words.startswith(f"config.json: {'; '.join(expected)};") and f"warning: {words}" in outcome.stderr
            assert not any(key in words for key in untold)
    # What is written is the export's.
    assert {key for key in ARCHITECTURE if key in config_of(tmp_path / "out")} == ARCHITECTURE.keys() - set(of_base)
    checked = verify(tmp_path / "out", "--base", base, "--device", "cpu")
    assert (checked.exit_code, found(checked)["proof"]) == (0, "proven"), checked.stderr
    level = container(checked)
    said = [words.replace("the checkpoint", "the export") for words in level["warnings"] if "config.json" in words]
    assert said == told and level["status"] == ("warn" if expected else "pass")


def test_a_base_that_says_null_of_its_quantization_has_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = without(pair[1], tmp_path, [], {"quantization_config": None})
    assert warned(built(pair[0], base, tmp_path / "out")) == []
    checked = verify(tmp_path / "out", "--base", base, "--device", "cpu")
    assert (checked.exit_code, found(checked)["proof"]) == (0, "proven"), checked.stderr


@pytest.mark.parametrize("key", ARCHITECTURE)
def test_another_value_of_the_architecture_is_refused_with_both(
    key: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    export, base = pair
    other = without(base, tmp_path, [], {key: OTHER[key]})
    out = tmp_path / "out"
    both = f"{key}: expected {ARCHITECTURE[key]!r} as in the "
    for what, words in (
        ("export", ("build-nvfp4", "--preset", "none", "--export", export, "--base", other, "--output", out)),
        ("source", ("swap-nibbles", edit(export, tmp_path / "source", swapped), out, "--base", other)),
    ):
        outcome = run_mopt(*words)
        assert (outcome.exit_code, outcome.error_code) == (3, "base.config"), outcome.stderr
        assert f"{both}{what}, found {OTHER[key]!r}" in outcome.message and not out.exists()
    checked = verify(export, "--base", other, "--device", "cpu")
    assert (checked.exit_code, found(checked)["proof"]) == (1, "mismatch")
    told = f"config.json: {key}: expected {OTHER[key]!r} as in the base, found {ARCHITECTURE[key]!r}"
    assert told in container(checked)["failures"]


def test_a_rewrite_tells_keys_of_one_side(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = edit(pair[0], tmp_path / "source", swapped)
    base = without(pair[1], tmp_path, [], {"axes_lens": [300, 512, 512]})
    outcome = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    (told,) = warned(outcome)
    assert told.startswith("config.json: only the base has axes_lens = [300, 512, 512];")
    assert warned(run_mopt("swap-nibbles", source, tmp_path / "unproven")) == []


def test_every_key_is_equal_refused_told_or_of_no_model() -> None:
    """Of thousands of pairs of small configs."""
    values: list[Any] = [None, True, False, 0, 2, "", "a", [], [1, 2], {"a": None}]
    keys, source = ["a", "b", "c", "_d", "_class_name", "quantization_config"], random.Random(0)
    for _ in range(5000):
        mine, theirs = ({key: source.choice(values) for key in keys if source.random() < 0.6} for _ in range(2))
        refused = {key: (left, right) for key, left, right in differing_keys(mine, theirs)}
        told = " ".join(one_sided_words(mine, theirs, "mine"))
        for key in keys:
            both = key in mine and key in theirs
            differs = mine.get(key) != theirs.get(key) and (both or key == "_class_name")
            assert (key in refused) is (key not in ("_d", "quantization_config") and differs), (mine, theirs)
            assert (f" {key} = " in told) is (key in "abc" and (key in mine) != (key in theirs)), (mine, theirs)
            assert key not in refused or refused[key] == (mine.get(key), theirs.get(key))
        assert one_sided_words(mine, mine, "mine") == []


def test_long_values_and_many_keys_are_cut() -> None:
    (told,) = one_sided_words({"a": "x" * 10**6}, {"b": list(range(10**6))}, "mine")
    assert len(told) < 500
    (told,) = one_sided_words({f"key{number:03}": number for number in range(100)}, {}, "mine")
    assert "key019 = 19 and 80 more" in told and "key020" not in told
