"""A checkpoint that is converted to ModelOpt's dialect says which modules are not quantized in SGLang's names too."""

import json
import shutil
from pathlib import Path

import pytest
from support import copy, run_mopt


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


def test_the_next_command_is_sglangs_where_it_loads_and_mopts_otherwise(families: Path, tmp_path: Path) -> None:
    """A pipeline beside the base names the model; a preset of the class says what SGLang makes of OUT."""
    pipeline = tmp_path / "a pipeline"
    copy(families / "qwen_image" / "base", pipeline)
    (pipeline / "model_index.json").write_text("{}")
    built = tmp_path / "built"
    given = ("--preset", "qwen-image", "--export", families / "qwen_image" / "nvfp4", "--base", pipeline)
    assert run_mopt("build-nvfp4", *given, "--output", built).exit_code == 0
    assert run_mopt("convert", built, tmp_path / "ct", "--to", "compressed-tensors").exit_code == 0

    def following(source: Path, *more: str | Path) -> str:
        out = tmp_path / "out"
        outcome = run_mopt("convert", source, out, "--to", "modelopt", "--overwrite", *more, json_report=False)
        assert outcome.exit_code == 0, outcome.stderr
        return next(line for line in outcome.stdout.splitlines() if line.startswith("next: "))

    out = tmp_path / "out"
    loads = f"next: sglang generate --model-path '{pipeline}' --transformer-path {out} --prompt '...'"
    assert following(tmp_path / "ct", "--base", pipeline) == loads
    alone = families / "qwen_image" / "base" / "transformer"
    assert following(tmp_path / "ct", "--base", alone) == f"next: mopt verify {out} --base {alone}"
    assert following(tmp_path / "ct") == f"next: mopt verify {out}"
    # The whole export has packed what SGLang holds in BF16 alone.
    export = families / "flux1" / "nvfp4"
    other = copy(families / "flux1" / "base", tmp_path / "flux")
    (other / "model_index.json").write_text("{}")
    assert run_mopt("convert", export, tmp_path / "whole", "--to", "torchao").exit_code == 0
    packed = run_mopt("convert", tmp_path / "whole", tmp_path / "back", "--to", "modelopt", "--base", other)
    assert packed.report is not None, packed.stderr
    [warning] = [one["message"] for one in packed.report["warnings"] if one["code"] == "preset.structural"]
    assert "--preset flux1-dev keeps them in BF16, in a build with this as --export" in warning
    assert packed.report["engine"] == "sglang" and packed.report["engines"]
    assert "next: mopt verify" in following(tmp_path / "whole", "--base", other)
