"""A checkpoint that is converted to ModelOpt's dialect says which modules are not quantized in SGLang's names too."""

import json
import shutil
from pathlib import Path

import pytest
from support import run_mopt


@pytest.mark.parametrize(("family", "preset"), [("wan", "wan2.2-t2v-a14b"), ("qwen_image", "qwen-image")])
def test_a_comfyui_file_becomes_what_a_build_declares(families: Path, tmp_path: Path, family: str, preset: str) -> None:
    export, base = families / family / "fp8", families / family / "base"
    built = ["convert-fp8", "--preset", preset, "--export", export, "--base", base]
    assert run_mopt(*built, "--output", tmp_path / "built").exit_code == 0
    assert run_mopt("convert", tmp_path / "built", tmp_path / "comfy", "--to", "comfyui").exit_code == 0
    (file,) = (tmp_path / "comfy").glob("*.safetensors")
    shutil.copy(file, tmp_path / "people-have.safetensors")  # without mopt's record
    converted = run_mopt(
        "convert", tmp_path / "people-have.safetensors", tmp_path / "out", "--to", "modelopt", "--base", base
    )
    assert converted.exit_code == 0, converted.stderr
    said, wanted = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["ignore"]
        for name in ("out", "built")
    )
    assert said == wanted
    on_disk = {name for name in wanted if not name.endswith("*")}
    assert any("." in name for name in on_disk)
