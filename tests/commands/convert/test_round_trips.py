"""ModelOpt to another dialect and back: the very files, by the record; and what is proven against the base."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support import edit_json, load, run_mopt, same_bits

from modelopt_convert.engines.limits import DEFAULT, limits

PAIRS = [
    ("flux2", "nvfp4", "comfyui"),
    ("wan", "nvfp4", "comfyui"),
    ("wan_i2v", "fp8", "comfyui"),
    ("qwen_image", "nvfp4", "comfyui"),
    ("ltx2", "fp8", "comfyui"),
    ("wan", "nvfp4", "compressed-tensors"),
    ("qwen_image", "fp8", "torchao"),
    ("flux1", "nvfp4", "torchao"),
    ("z_image", "nvfp4", "torchao"),
    ("z_image", "nvfp4", "compressed-tensors"),
    ("hunyuan_video", "fp8", "compressed-tensors"),
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
    # ComfyUI's files have no config.json: what the record says of it is told as a claim.
    claimed = ["convert.config_claimed"] if to == "comfyui" else []
    # torchao's FP8 has no place for input scales.
    claimed += ["convert.scales_claimed"] if (algorithm, to) == ("fp8", "torchao") else []
    # What ModelOpt packs and SGLang cannot is told, and is in the export too; so is what SGLang makes of its class.
    told = [one["code"] for one in back.report["warnings"] if one["code"] != "preset.structural"]
    config = json.loads((source / "transformer" / "config.json").read_text())
    claimed += [f"engine.{one.grade}" for one in limits(config, algorithm) if one.engine == DEFAULT]
    assert sorted(told) == sorted(claimed), back.report["warnings"]
    assert back.report["convert"]["words"] == "not proven: no base"
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
    refused = run_mopt("convert", odd, tmp_path / "there", "--to", "torchao")
    assert refused.exit_code == 3 and "[naming.unknown_model]" in refused.stderr  # of a class whose names are others
    edit_json(odd / "config.json", lambda config: config.update(_class_name="OtherTransformer2DModel"))
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


def test_z_image_with_one_scale_for_q_k_and_v_comes_back(families: Path, tmp_path: Path) -> None:
    """Its names in ComfyUI fuse the three."""
    source = tmp_path / "source"
    shutil.copytree(families / "z_image" / "nvfp4", source)
    (file,) = (source / "transformer").glob("*.safetensors")
    tensors, roles = load(source / "transformer"), ("weight_scale_2", "input_scale")
    for name in [
        one for one in tensors if one.endswith(tuple(f".to_{leaf}.{role}" for leaf in "kv" for role in roles))
    ]:
        head, leaf, role = name.rsplit(".", 2)
        tensors[name] = tensors[f"{head}.to_q.{role}"].clone()
        assert leaf in ("to_k", "to_v")
    save_file(tensors, file, {"format": "pt"})
    there = run_mopt("convert", source, tmp_path / "there", "--to", "comfyui")
    assert there.exit_code == 0 and there.report is not None, there.stderr
    assert there.report["convert"]["lossy"] == [] and there.report["convert"]["restorable"]
    assert any(name.endswith("attention.qkv.weight") for name in load(tmp_path / "there"))
    assert run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt").exit_code == 0
    for one in (source / "transformer").iterdir():
        assert (tmp_path / "back" / one.name).read_bytes() == one.read_bytes(), one.name


@pytest.mark.parametrize("choice", ["bf16", "rebase", "requantize"])
@pytest.mark.parametrize(
    ("family", "algorithm"), [("hunyuan_video", "nvfp4"), ("hunyuan_video", "fp8"), ("z_image", "fp8")]
)
def test_what_names_fuse_goes_by_choice_and_the_rest_is_exact(
    families: Path, tmp_path: Path, family: str, algorithm: str, choice: str
) -> None:
    source = families / family / algorithm
    more = ("--to", "comfyui", "--base", families / family / "base")
    assert run_mopt("convert", source, tmp_path / "no", *more).exit_code == 3 and not (tmp_path / "no").exists()
    done = run_mopt("convert", source, tmp_path / "out", *more, "--inexact", choice)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    told = done.report["convert"]
    how = {"bf16": "bf16", "rebase": "rebased", "requantize": "requantized"}[choice]
    lossy = {member for one in told["lossy"] for member in one["members"]}
    assert told["proven"] and told["modules"][how] == len(lossy) > 0
    assert all(0 < one["rel_error"] < 0.1 for one in told["lossy"])
    back = run_mopt(
        "convert", tmp_path / "out", tmp_path / "back", "--to", "modelopt", "--base", families / family / "base"
    )
    if choice == "bf16":
        assert back.exit_code == 0, back.stderr
    before, after = load(source / "transformer"), load(tmp_path / "back") if back.exit_code == 0 else {}
    exact = [
        name for name in before if name.endswith(".weight_scale") and name.removesuffix(".weight_scale") not in lossy
    ]
    assert len(exact) == told["modules"]["exact"] > 0
    for name in exact if after else []:
        module = name.removesuffix("_scale")
        assert same_bits(before[name], after[name]) and same_bits(before[module], after[module]), name
