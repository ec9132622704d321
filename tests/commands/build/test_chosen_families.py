"""Families whose presets rest on no published checkpoint: chosen by config.json, built, proven, and verified whole."""

from pathlib import Path

import pytest
from families import MORE, allowed
from support import run_mopt

COMMANDS = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}


@pytest.mark.parametrize("form", COMMANDS)
@pytest.mark.parametrize("family", MORE)
def test_a_real_export_is_built_with_the_preset_that_its_config_chooses(
    families: Path, tmp_path: Path, family: str, form: str
) -> None:
    base, out = families / family / "base", tmp_path / "out"
    inputs = ("--export", families / family / form, "--base", base)
    built = run_mopt(COMMANDS[form], *inputs, "--output", out, *allowed(family, form))
    assert built.exit_code == 0 and built.report is not None, built.stderr
    assert built.report["preset"]["name"] == MORE[family][0]
    assert built.report["proof"]["words"] == "proven"
    verified = run_mopt("verify", out, "--base", base, "--device", "cpu")
    assert verified.exit_code == 0 and verified.report is not None, verified.stderr
    assert verified.report["verify"]["statement"].startswith("proven")
