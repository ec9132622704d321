"""Image-to-video models of Wan: a preset each, told apart by config.json, and what SGLang cannot load is refused."""

from pathlib import Path

import pytest
from families import PRESETS
from sglang_runtime import is_excluded
from support import Outcome, config_of, run_mopt

COMMANDS = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}
NAMELESS = ("to_q", "to_k", "to_v", "to_out")  # SGLang's WanI2VCrossAttention hands its prefix to none of these


def built(families: Path, family: str, form: str, out: Path, *more: str) -> Outcome:
    where = families / family
    given = ("--export", where / form, "--base", where / "base", "--output", out)
    return run_mopt(COMMANDS[form], *given, *more)


@pytest.mark.parametrize(
    ("family", "form", "code"),
    [
        ("wan_i2v", "nvfp4", None),
        ("wan_i2v", "fp8", None),
        ("wan_i2v_image", "nvfp4", "engine.known_broken"),
        ("wan_i2v_image", "fp8", None),
    ],
)
def test_which_preset_is_chosen_and_what_becomes_of_it(
    families: Path, tmp_path: Path, family: str, form: str, code: str | None
) -> None:
    outcome = built(families, family, form, tmp_path / "out")
    assert outcome.report is not None and outcome.report["preset"]["name"] == PRESETS[family][0]
    assert outcome.error_code == code


@pytest.mark.parametrize("preset", ["wan2.2-t2v-a14b", "wan2.2-i2v-a14b"])
def test_the_preset_of_a_model_without_image_attention_is_refused(families: Path, tmp_path: Path, preset: str) -> None:
    """mopt took the preset of text-to-video, and SGLang cast kept modules to FP8."""
    outcome = built(families, "wan_i2v_image", "fp8", tmp_path / "out", "--preset", preset)
    assert outcome.error_code == "preset.wrong_model"
    if preset == "wan2.2-i2v-a14b":
        assert "added_kv_proj_dim" in outcome.stderr and "expects none, found 96" in outcome.stderr


def test_kept_attention_is_ignored_by_the_name_that_sglang_has(families: Path, tmp_path: Path) -> None:
    assert built(families, "wan_i2v_image", "fp8", tmp_path / "out").exit_code == 0
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert all(is_excluded(name, ignore) for name in NAMELESS)
    packed = [f"blocks.3.{name}" for name in (*NAMELESS, "attn2.add_k_proj", "ffn.fc_in")]
    assert not any(is_excluded(name, ignore) for name in packed)


def test_attention_packed_in_some_blocks_alone_is_refused(families: Path, tmp_path: Path) -> None:
    """By one name SGLang cannot tell a packed module from a kept one."""
    outcome = built(families, "wan_i2v_image", "fp8", tmp_path / "out", "--preset", "none")
    assert outcome.error_code == "preset.fused_group"
    assert "blocks.3.attn2.to_" in outcome.stderr and "would be ignored as to_" in outcome.stderr
