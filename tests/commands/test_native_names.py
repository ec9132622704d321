"""Checkpoints in the models' own names and in ComfyUI's dialect, wherever one is taken: what they stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, allowed
from safetensors.torch import load_file, save_file
from support import Tensors, config_of, inspected, load, run_mopt, same_bits

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.renaming import under_native_names
from modelopt_convert.families.family import Spelling
from modelopt_convert.families.table import recognise

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
# Those whose NVFP4 export ComfyUI's names hold exactly.
EXACT = ("flux2", "wan", "qwen_image")
COMFYUI = "model.diffusion_model."


def native_base(transformer: Path, spelling: Spelling = "comfyui", prefix: str = "") -> Tensors:
    """An unquantized transformer under its own names; tests/families compares the tables with ComfyUI and diffusers."""
    with CheckpointReader(transformer) as reader:
        found = recognise({name: info.shape for name, info in reader.tensors.items()})
        assert found is not None
        named = under_native_names(Canonical(reader.tensors, {}, {}), found.family, spelling, prefix)
        return {
            name: torch.frombuffer(bytearray(reader.read_of(info, 0, info.num_bytes)), dtype=TORCH[info.dtype]).reshape(
                info.shape
            )
            for name, info in named.tensors.items()
        }


def written(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def base_file(families: Path, family: str, room: Path, prefix: str = COMFYUI) -> Path:
    """The family's base as one file of ComfyUI, with a VAE and a text encoder beside it where a prefix tells them."""
    tensors = native_base(families / family / "base" / "transformer", prefix=prefix)
    if prefix:
        tensors |= {f"{name}.weight": torch.ones(4, 4) for name in ("first_stage_model.x", "text_encoders.t5xxl.y")}
    return written(tensors, room / "base.safetensors")


def comfyui(families: Path, family: str, room: Path, algorithm: str = "nvfp4") -> Path:
    outcome = run_mopt("convert", families / family / algorithm, room / "comfyui", "--to", "comfyui")
    assert outcome.exit_code == 0, outcome.stderr
    (file,) = (room / "comfyui").glob("*.safetensors")
    return file


def assert_same(left: Path, right: Path) -> None:
    one, other = load(left), load(right)
    assert one.keys() == other.keys()
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_native_names_proves_what_the_base_in_diffusers_names_does(
    family: str, families: Path, tmp_path: Path
) -> None:
    """Byte for byte the same output; what is not the transformer is left out and said."""
    file, export = base_file(families, family, tmp_path), families / family / "nvfp4"
    more = ("--export", export, *allowed(family), "--verify", "cpu")
    usual = run_mopt("build-nvfp4", *more, "--base", families / family / "base", "--output", tmp_path / "usual")
    outcome = run_mopt("build-nvfp4", *more, "--base", file, "--output", tmp_path / "out")
    assert usual.exit_code == 0 and usual.report is not None, usual.stderr
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert_same(tmp_path / "usual", tmp_path / "out")
    assert config_of(tmp_path / "usual") == config_of(tmp_path / "out")
    assert outcome.report["proof"]["status"] == "pass"
    assert outcome.report["proof"]["modules"] == usual.report["proof"]["modules"]
    ledger = outcome.report["ledger"]["base"]
    assert ledger.keys() == load_file(file).keys()
    assert {name for name, fate in ledger.items() if fate.startswith("left out: ")} == {
        "first_stage_model.x.weight",
        "text_encoders.t5xxl.y.weight",
    }
    assert outcome.report["inputs"]["base"]["config_from"] == "export"
    assert {one["code"] for one in outcome.report["warnings"]} >= {"input.read_as", "base.no_config"}


@pytest.mark.parametrize("family", EXACT)
def test_a_comfyui_file_is_an_export_a_checkpoint_to_verify_and_a_source_to_inspect(
    family: str, families: Path, tmp_path: Path
) -> None:
    base, native, file = (
        families / family / "base",
        base_file(families, family, tmp_path),
        comfyui(families, family, tmp_path),
    )
    more = (*allowed(family), "--verify", "off")
    usual = run_mopt(
        "build-nvfp4", "--export", families / family / "nvfp4", "--base", base, *more, "--output", tmp_path / "usual"
    )
    outcome = run_mopt("build-nvfp4", "--export", file, "--base", base, *more, "--output", tmp_path / "out")
    assert usual.exit_code == outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert_same(tmp_path / "usual", tmp_path / "out")
    assert outcome.report["ledger"]["export"].keys() == load_file(file).keys()
    modules = len(outcome.report["proof"]["modules"])
    for against in (base, native):
        # Its record beside it: digests are of the tensors as they are stored.
        verified = run_mopt("verify", file.parent, "--base", against)
        assert verified.exit_code == 0 and verified.report is not None, verified.stderr
        found = verified.report["verify"]
        assert (found["verdict"], found["proof"]) == ("pass", "proven") and len(found["modules"]) == modules
        assert {one["level"]: one["status"] for one in found["levels"]}["record"] == "pass"
        looked = inspected(file, "--base", against)
        assert {one["basis"] for one in looked["modules"].values()} == {"proven"}
        assert {one["nibble_order"] for one in looked["modules"].values()} == {"high"}
    unproven = run_mopt("verify", file.parent)
    assert unproven.exit_code == 0 and unproven.report is not None and unproven.report["verify"]["verdict"] == "pass"


def test_one_wrong_byte_of_a_comfyui_file_is_found(families: Path, tmp_path: Path) -> None:
    """Without the record beside it, by the base alone; with it by the digest, too."""
    file = comfyui(families, "wan", tmp_path)
    tensors = load_file(file)
    module = next(name.removesuffix(".weight") for name, one in tensors.items() if one.dtype == torch.uint8)
    tensors[f"{module.removesuffix('.comfy_quant')}.weight"][5, 7] ^= 0x10
    alone = written(tensors, tmp_path / "alone" / "x.safetensors")
    outcome = run_mopt("verify", alone, "--base", families / "wan" / "base")
    assert outcome.exit_code == 1 and outcome.report is not None, outcome.stderr
    assert outcome.report["verify"]["verdict"] == "fail"
    written(tensors, file)
    assert run_mopt("verify", file.parent).exit_code == 1


def test_fp8_of_comfyui_is_an_export(families: Path, tmp_path: Path) -> None:
    base, file = families / "wan" / "base", comfyui(families, "wan", tmp_path, "fp8")
    usual = run_mopt(
        "convert-fp8", "--export", families / "wan" / "fp8", "--base", base, "--output", tmp_path / "usual"
    )
    outcome = run_mopt("convert-fp8", "--export", file, "--base", base, "--output", tmp_path / "out")
    assert usual.exit_code == outcome.exit_code == 0, outcome.stderr
    assert_same(tmp_path / "usual", tmp_path / "out")
    assert run_mopt("verify", file, "--base", base).exit_code == 0


def test_two_native_files_need_a_config(families: Path, tmp_path: Path) -> None:
    """Names and shapes tell the class; sizes are not invented."""
    file, base = comfyui(families, "wan", tmp_path), base_file(families, "wan", tmp_path)
    words = ("build-nvfp4", "--export", file, "--base", base, "--output", tmp_path / "out")
    outcome = run_mopt(*words)
    assert (outcome.exit_code, outcome.error_code) == (3, "input.no_config") and "--config" in outcome.message
    given = run_mopt(*words, "--config", families / "wan" / "base" / "transformer")
    assert given.exit_code == 0, given.stderr


def test_a_rewrite_of_a_native_file_is_proven_against_a_base_in_diffusers_names(families: Path, tmp_path: Path) -> None:
    file = comfyui(families, "flux2", tmp_path)
    outcome = run_mopt(
        "unswizzle-scales", file, tmp_path / "out", "--base", families / "flux2" / "base", "--force-names"
    )
    # Its nibbles stay high, which is declared; every byte is the base's.
    assert outcome.report is not None and outcome.report["proof"]["status"] == "pass", outcome.stderr


Change = Callable[[Tensors], object]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors: tensors.update({f"{COMFYUI}blocks.0.new.weight": torch.ones(4, 4)}), "naming.unknown"),
        (lambda tensors: tensors.update({"lora_unet_x.lora_up.weight": torch.ones(4, 4)}), "naming.unknown"),
    ],
    ids=["of no model", "a LoRA beside"],
)
def test_a_tensor_that_the_model_does_not_have_is_refused(
    change: Change, code: str, families: Path, tmp_path: Path
) -> None:
    tensors = native_base(families / "wan" / "base" / "transformer", prefix=COMFYUI)
    change(tensors)
    refused(families, "wan", written(tensors, tmp_path / "base.safetensors"), tmp_path, code)


def test_a_norm_under_two_names_is_refused(families: Path, tmp_path: Path) -> None:
    tensors = native_base(families / "flux2" / "base" / "transformer", prefix=COMFYUI)
    norm = next(name for name in tensors if name.endswith("query_norm.weight"))
    tensors[norm.replace(".weight", ".scale")] = tensors[norm].clone()
    refused(families, "flux2", written(tensors, tmp_path / "base.safetensors"), tmp_path, "naming.twice")


def test_two_transformers_in_one_file_are_not_told_apart(families: Path, tmp_path: Path) -> None:
    folder = families / "wan" / "base" / "transformer"
    both = native_base(folder, prefix=COMFYUI) | native_base(folder, prefix="diffusion_model.")
    refused(families, "wan", written(both, tmp_path / "base.safetensors"), tmp_path, "base.naming")


def test_codes_of_unknown_layout_are_not_cut(families: Path, tmp_path: Path) -> None:
    """A fused module in a format that mopt does not know: nothing says how its rows lie."""
    tensors = native_base(families / "flux2" / "base" / "transformer", prefix=COMFYUI)
    name = f"{COMFYUI}double_blocks.0.img_attn.qkv.weight"
    tensors[name] = tensors[name].to(torch.int8)
    refused(families, "flux2", written(tensors, tmp_path / "base.safetensors"), tmp_path, "dialect.unknown_layout")


def test_a_base_that_lacks_a_part_of_a_fused_module_is_refused(families: Path, tmp_path: Path) -> None:
    file, tensors = comfyui(families, "flux2", tmp_path), load(families / "flux2" / "base" / "transformer")
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    base = written(tensors, tmp_path / "base.safetensors")
    outcome = run_mopt("inspect", file, "--base", base)
    assert (outcome.exit_code, outcome.error_code) == (3, "naming.partial"), outcome.stderr


def test_a_file_of_two_formats_is_for_convert_alone(families: Path, tmp_path: Path) -> None:
    """Markers say which module is in which."""
    (tmp_path / "fp8").mkdir()
    four, eight = comfyui(families, "wan", tmp_path), comfyui(families, "wan", tmp_path / "fp8", "fp8")
    tensors, other = load_file(four), load_file(eight)
    module = next(name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant"))
    mixed = {name: one for name, one in tensors.items() if not name.startswith(f"{module}.")}
    mixed |= {name: one for name, one in other.items() if name.startswith(f"{module}.")}
    assert json.loads(bytes(mixed[f"{module}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    outcome = run_mopt("verify", written(mixed, tmp_path / "mixed" / "x.safetensors"))
    assert (outcome.exit_code, outcome.error_code) == (3, "dialect.formats"), outcome.stderr


def refused(families: Path, family: str, base: Path, room: Path, code: str) -> None:
    export = families / family / "nvfp4"
    outcome = run_mopt("build-nvfp4", "--export", export, "--base", base, *allowed(family), "--output", room / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, code), outcome.stderr
    assert not (room / "out").exists()
