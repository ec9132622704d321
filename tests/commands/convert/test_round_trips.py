"""ModelOpt to another dialect and back: the very files, by the record; and what is proven against the base."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support import load, run_mopt, same_bits

PAIRS = [
    ("flux2", "nvfp4", "comfyui"),
    ("wan", "nvfp4", "comfyui"),
    ("wan_i2v", "fp8", "comfyui"),
    ("qwen_image", "nvfp4", "comfyui"),
    ("ltx2", "fp8", "comfyui"),
    ("wan", "nvfp4", "compressed-tensors"),
    ("qwen_image", "fp8", "torchao"),
    ("flux1", "nvfp4", "torchao"),
]


@pytest.mark.parametrize(("family", "algorithm", "to"), PAIRS)
def test_there_and_back_are_the_very_files(
    families: Path, tmp_path: Path, family: str, algorithm: str, to: str
) -> None:
    source = families / family / algorithm
    there = run_mopt("convert", source, tmp_path / "there", "--to", to, "--base", families / family / "base")
    assert there.exit_code == 0 and there.report is not None, there.stderr
    told = there.report["convert"]
    assert told["proven"] and told["restorable"] and told["not_restorable"] == [] and told["lossy"] == []
    assert told["proof"]["compared"] == told["proof"]["equal"] > 0
    assert told["modules"]["exact"] + told["modules"]["rounded_global"] == len(there.report["proof"]["modules"]) > 0
    back = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert back.exit_code == 0 and back.report is not None, back.stderr
    assert back.report["warnings"] == [] and back.report["convert"]["words"] == "not proven: no base"
    files = sorted(one.name for one in (source / "transformer").iterdir())
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (source / "transformer" / name).read_bytes(), name


def test_a_file_without_a_marker_is_not_taken_for_another_dialect(families: Path, tmp_path: Path) -> None:
    """Names, dtypes and shapes are those of Black Forest Labs' files for ComfyUI, and the nibbles lie the other way."""
    source = families / "flux2" / "nvfp4"
    assert run_mopt("convert", source, tmp_path / "there", "--to", "bfl-diffusers").exit_code == 0
    refused = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert refused.exit_code == 3 and "[convert.dialect]" in refused.stderr, refused.stderr
    assert "--from bfl-diffusers" in refused.stderr and not (tmp_path / "back").exists()
    told = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--from", "bfl-diffusers")
    assert told.exit_code == 0, told.stderr
    for file in (source / "transformer").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_comfyui_file_under_a_prefix_with_a_scale_in_bf16_comes_back(families: Path, tmp_path: Path) -> None:
    assert run_mopt("convert", families / "qwen_image" / "fp8", tmp_path / "first", "--to", "comfyui").exit_code == 0
    (file,) = (tmp_path / "first").glob("*.safetensors")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load(tmp_path / "first").items()}
    scale = next(name for name in tensors if name.endswith(".input_scale"))
    tensors[scale] = tensors[scale].bfloat16()
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["_quantization_metadata"])
    said["layers"] = {f"model.diffusion_model.{name}": one for name, one in said["layers"].items()}
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign" / "theirs.safetensors"
    save_file(tensors, foreign, {"_quantization_metadata": json.dumps(said)})
    config = families / "qwen_image" / "base"
    there = run_mopt("convert", foreign, tmp_path / "there", "--to", "modelopt", "--config", config)
    assert there.exit_code == 0, there.stderr
    back = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "comfyui")
    assert back.exit_code == 0, back.stderr
    assert (tmp_path / "back" / "theirs.safetensors").read_bytes() == foreign.read_bytes()


def test_a_model_without_a_key_map_keeps_its_names(families: Path, tmp_path: Path) -> None:
    from support import edit

    def rename(tensors: dict[str, object]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    odd = edit(families / "qwen_image" / "fp8", tmp_path / "odd", rename)
    assert run_mopt("convert", odd, tmp_path / "there", "--to", "torchao").exit_code == 0
    assert run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt").exit_code == 0
    before, after = load(odd), load(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    refused = run_mopt("convert", odd, tmp_path / "native", "--to", "comfyui")
    assert refused.exit_code == 3 and "[convert.family]" in refused.stderr


def test_the_base_of_another_model_and_a_changed_code_are_no_proof(families: Path, tmp_path: Path) -> None:
    from support import edit

    def change(tensors: dict[str, object]) -> None:
        name = next(one for one in tensors if one.endswith("to_q.weight") and str(tensors[one].dtype) == "torch.uint8")  # type: ignore[attr-defined]
        tensors[name].view(-1)[7] ^= 0x10  # type: ignore[attr-defined]

    odd = edit(families / "qwen_image" / "nvfp4", tmp_path / "odd", change)
    base = families / "qwen_image" / "base"
    refused = run_mopt("convert", odd, tmp_path / "out", "--to", "comfyui", "--base", base, "--max-error", "0")
    assert refused.exit_code == 1 and "[check.proof]" in refused.stderr, refused.stderr
    other = families / "flux2" / "base"
    refused = run_mopt(
        "convert", families / "qwen_image" / "nvfp4", tmp_path / "out", "--to", "comfyui", "--base", other
    )
    assert refused.exit_code == 3 and "[base.config]" in refused.stderr, refused.stderr
    assert not (tmp_path / "out").exists()
