"""A record is attacked at random: what comes out is right in names and values, or the run refuses in one line."""

import base64
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import edit_json, load, run_mopt, same_bits

_SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
_DTYPES = ("F16", "BF16", "F32", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16")


@pytest.fixture(scope="module", params=["comfyui", "compressed-tensors"])
def there(request: pytest.FixtureRequest, families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forged") / "there"
    done = run_mopt("convert", families / "flux2" / "nvfp4", out, "--to", request.param)
    assert done.exit_code == 0, done.stderr
    return out


def tensors(said: dict[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = next(iter(said["files"].values()))["tensors"]
    return found


def forge(data: st.DataObject, record: dict[str, Any]) -> None:
    """Change one thing of a record."""
    said = record["converted"]
    entries = tensors(said)
    name = data.draw(st.sampled_from(sorted(entries)))
    entry = entries[name]
    kind = data.draw(
        st.sampled_from(["dtype", "shape", "name", "byte", "drop", "keep", "prefix", "spelling", "digest"])
    )
    if kind == "dtype":
        entry[0] = data.draw(st.sampled_from(_DTYPES))
    elif kind == "shape":
        entry[1] = data.draw(st.sampled_from([entry[1][::-1], [*entry[1], 1], [1, *entry[1]], entry[1][:-1]]))
    elif kind == "name":
        entries[data.draw(st.sampled_from([f"{name}X", f"model.{name}", name.replace("0", "9"), "foo.weight"]))] = (
            entries.pop(name)
        )
    elif kind == "byte":
        kept = sorted(one for one, found in entries.items() if len(found) > 2)
        one = entries[data.draw(st.sampled_from(kept))]
        raw = bytearray(base64.b64decode(one[2]))
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        one[2] = base64.b64encode(raw).decode()
    elif kind == "drop":
        del entries[name]
    elif kind == "keep":
        small = sorted(one for one, found in entries.items() if len(found) == 2 and found[1] in ([], [32]))
        one = data.draw(st.sampled_from(small))
        width = {"F32": 4, "BF16": 2}[entries[one][0]] * (32 if entries[one][1] else 1)
        raw = data.draw(st.binary(min_size=width, max_size=width))
        entries[one] = [*entries[one], base64.b64encode(raw).decode()]
    elif kind == "prefix":
        said["prefix"] = data.draw(st.sampled_from(["model.", "model.diffusion_model.", "x"]))
    elif kind == "spelling":
        said["spelling"] = data.draw(st.sampled_from(["comfyui", "original"]))
    else:
        record["digests"]["tensors"] = {}


@_SETTINGS
@given(data=st.data())
def test_no_forged_record_changes_a_value_or_a_name(
    there: Path, families: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(there, folder / "there")
    edit_json(folder / "there" / "mopt.json", lambda record: forge(data, record))
    config = families / "flux2" / "base"
    done = run_mopt("convert", folder / "there", folder / "back", "--to", "modelopt", "--config", config)
    if done.exit_code:
        assert done.exit_code == 3 and done.stderr.count("error:") == 1 and "mopt.json" in done.stderr, done.stderr
        return
    assert done.report is not None
    wanted, found = load(families / "flux2" / "nvfp4" / "transformer"), load(folder / "back")
    claimed = set(done.report["convert"]["restored"])
    for name in wanted.keys() | found.keys():
        if "_amax" in name:  # quantizer state: no value of the model, and the report says that the record alone has it
            assert name not in found or name in claimed
            continue
        assert name in wanted and name in found, name
        # 1/g is the file's: a g that the record does not give is one of few neighbours.
        is_reciprocal = "comfy" not in done.report["convert"]["from"] and name.endswith(
            ("weight_scale_2", "input_scale")
        )
        near = is_reciprocal and abs(float(found[name] / wanted[name]) - 1) < 2**-22
        assert near or same_bits(found[name], wanted[name]), name
    shutil.rmtree(folder)


@pytest.mark.parametrize("member", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("role", ["input_scale", "weight_scale_2"])
def test_a_scale_that_the_file_has_once_is_every_members(
    comfyui: Path, families: Path, tmp_path: Path, member: str, role: str
) -> None:
    """Written again the fused module has its first member's scale: the others' would be compared with nothing."""
    name = f"transformer_blocks.0.attn.{member}.{role}"
    forged = base64.b64encode(struct.pack("<f", 2.5e-38)).decode()
    there = tmp_path / "there"
    shutil.copytree(comfyui, there)
    edit_json(there / "mopt.json", lambda record: tensors(record["converted"])[name].append(forged))
    done = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt", "--base", families / "flux2" / "base")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert name not in done.report["convert"]["restored"]
    assert "convert.not_restored" in {one["code"] for one in done.report["warnings"]}
    assert same_bits(load(tmp_path / "back")[name], load(families / "flux2" / "nvfp4" / "transformer")[name])


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "class": lambda said: said.update(_class_name="WanTransformer3DModel"),
    "quant_algo": lambda said: said["quantization_config"].update(quant_algo="FP8"),
    "quant_type": lambda said: said["quantization_config"].update(quant_type="FP8"),
    "group_size": lambda said: said["quantization_config"].update(group_size=32),
    "targets": lambda said: said["quantization_config"]["config_groups"]["group_0"].update(targets=["x", "Linear"]),
    "bits": lambda said: said["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
    "ignores what is packed": lambda said: said["quantization_config"]["ignore"].append("*to_q*"),
    "packs what is not": lambda said: said["quantization_config"].update(ignore=[]),
    "dynamic": lambda said: said["quantization_config"].update(dynamic_input_scale=True),
    "method": lambda said: said["quantization_config"].update(quant_method="fp8"),
    "layout": lambda said: said["quantization_config"].update(swap_weight_nibbles=True),
    "none": lambda said: said.pop("quantization_config"),
    "other key": lambda said: said["quantization_config"].update(kv_cache_scheme={"num_bits": 8}),
}


@pytest.fixture(scope="module")
def comfyui(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("claimed") / "there"
    assert run_mopt("convert", families / "flux2" / "nvfp4", out, "--to", "comfyui").exit_code == 0
    return out


def forged_config(there: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    def edit(record: dict[str, Any]) -> None:
        config = json.loads(record["converted"]["config"])
        change(config)
        record["converted"]["config"] = json.dumps(config)

    shutil.copytree(there, folder)
    edit_json(folder / "mopt.json", edit)
    return folder


@pytest.mark.parametrize("forgery", CONFIGS)
def test_a_config_that_is_not_of_the_tensors_is_not_taken(
    comfyui: Path, families: Path, tmp_path: Path, forgery: str
) -> None:
    there = forged_config(comfyui, tmp_path / "there", CONFIGS[forgery])
    refused = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt")
    assert refused.exit_code == 3 and "[convert.config]" in refused.stderr and "mopt.json" in refused.stderr
    base = families / "flux2" / "base"
    done = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert "convert.not_restored" in {one["code"] for one in done.report["warnings"]}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["_class_name"] == "Flux2Transformer2DModel"
    assert written["quantization_config"]["quant_algo"] == "NVFP4"


def test_a_config_that_nothing_contradicts_is_told_as_a_claim_and_a_base_checks_it(
    comfyui: Path, families: Path, tmp_path: Path
) -> None:
    there = forged_config(comfyui, tmp_path / "there", lambda said: said.update(num_layers=77))
    done = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    # What SGLang makes of FLUX.2 in NVFP4 is told of every such checkpoint.
    assert [one["code"] for one in done.report["warnings"]] == ["convert.config_claimed", "engine.wrong"]
    base = families / "flux2" / "base"
    done = run_mopt("convert", there, tmp_path / "checked", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert "convert.not_restored" in {one["code"] for one in done.report["warnings"]}
    assert json.loads((tmp_path / "checked" / "config.json").read_text())["num_layers"] == 2


ENTRIES: dict[str, list[Any]] = {
    "foo.weight": ["BF16", [4], base64.b64encode(bytes(8)).decode()],
    "transformer_blocks.0.attn.to_q.bias": ["BF16", [128], base64.b64encode(bytes(256)).decode()],
    "transformer_blocks.0.attn.to_q.pre_quant_scale": ["F32", [128], base64.b64encode(bytes(512)).decode()],
    "transformer_blocks.0.attn.norm_q.weight": ["F16", [32]],
}


def test_the_bytes_of_the_file_under_another_dtype_are_not_its_value(
    comfyui: Path, families: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.0.attn.norm_q.weight"
    wanted = load(families / "flux2" / "nvfp4" / "transformer")[name]
    raw = base64.b64encode(bytes(wanted.view(torch.uint8).tolist())).decode()
    for entry in (["F16", [32], raw], ["BF16", [32, 1], raw]):
        there = tmp_path / "there"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(comfyui, there)
        edit_json(there / "mopt.json", lambda record, one=entry: tensors(record["converted"]).update({name: one}))
        done = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt", "--overwrite")
        assert done.exit_code == 0 and done.report is not None, done.stderr
        told = [one["message"] for one in done.report["warnings"] if one["code"] == "convert.not_restored"]
        assert len(told) == 1 and name in told[0]
        assert same_bits(load(tmp_path / "back")[name], wanted)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_the_file_has_no_place_for_is_told(
    comfyui: Path, families: Path, tmp_path: Path, name: str
) -> None:
    there = tmp_path / "there"
    shutil.copytree(comfyui, there)
    edit_json(there / "mopt.json", lambda record: tensors(record["converted"]).update({name: ENTRIES[name]}))
    base = families / "flux2" / "base"
    done = run_mopt("convert", there, tmp_path / "back", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    told = [one["message"] for one in done.report["warnings"] if one["code"] == "convert.not_restored"]
    assert len(told) == 1 and "mopt.json" in told[0]
    wanted, found = load(families / "flux2" / "nvfp4" / "transformer"), load(tmp_path / "back")
    assert all(name in wanted and same_bits(found[name], wanted[name]) for name in found)


def test_the_record_of_a_rounded_scale_is_what_verify_finds(families: Path, tmp_path: Path) -> None:
    base = families / "flux2" / "base"
    there = run_mopt(
        "convert", families / "flux2" / "nvfp4", tmp_path / "out", "--to", "compressed-tensors", "--base", base
    )
    assert there.exit_code == 0 and there.report is not None
    rounded = there.report["convert"]["modules"]["rounded_global"]
    record = json.loads((tmp_path / "out" / "mopt.json").read_text())["proof"]
    assert rounded > 0 and record["counts"]["nearest"] == rounded
    assert run_mopt("verify", tmp_path / "out", "--base", base).exit_code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_a_claimed_scale_that_can_be_none_is_not_used(families: Path, tmp_path: Path, value: float) -> None:
    """torchao's FP8 has no place for input scales: nothing in the file contradicts one."""
    assert run_mopt("convert", families / "wan" / "fp8", tmp_path / "there", "--to", "torchao").exit_code == 0
    forged = base64.b64encode(struct.pack("<f", value)).decode()
    names: list[str] = []

    def edit(record: dict[str, Any]) -> None:
        entries = tensors(record["converted"])
        names.append(min(name for name in entries if name.endswith(".input_scale")))
        entries[names[0]][2] = forged

    edit_json(tmp_path / "there" / "mopt.json", edit)
    done = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert names[0] not in done.report["convert"]["restored"] and names[0] not in load(tmp_path / "back")
    assert "convert.not_restored" in {one["code"] for one in done.report["warnings"]}


def test_a_record_beside_other_weights_gives_nothing_that_the_file_does_not_say(
    families: Path, exports: Path, tmp_path: Path
) -> None:
    """torchao's FP8 has no place for input scales: those of another export are not this one's."""
    for name in ("fp8", "fp8_trained"):
        done = run_mopt("convert", exports / name, tmp_path / name, "--to", "torchao")
        assert done.exit_code == 0, done.stderr
    (weights,) = (tmp_path / "fp8_trained").glob("*.safetensors")
    shutil.copy(weights, tmp_path / "fp8")
    done = run_mopt("convert", tmp_path / "fp8", tmp_path / "back", "--to", "modelopt")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert not [name for name in load(tmp_path / "back") if name.endswith("input_scale")]
    told = {one["code"]: one["message"] for one in done.report["warnings"]}
    assert "the record is of another" in told["convert.not_restored"] and "convert.scales_claimed" not in told


def test_a_scale_that_the_record_alone_has_is_told_as_a_claim(families: Path, tmp_path: Path) -> None:
    assert run_mopt("convert", families / "wan" / "fp8", tmp_path / "there", "--to", "torchao").exit_code == 0
    done = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    told = [one["message"] for one in done.report["warnings"] if one["code"] == "convert.scales_claimed"]
    scales = sum(name.endswith("input_scale") for name in load(tmp_path / "back"))
    assert len(told) == 1 and told[0].startswith(f"{scales} scales are what the record of SOURCE claims")


@pytest.mark.parametrize("size", [True, 96.0])
def test_a_shape_in_the_record_is_of_whole_numbers(families: Path, tmp_path: Path, size: object) -> None:
    assert run_mopt("convert", families / "wan" / "fp8", tmp_path / "there", "--to", "torchao").exit_code == 0

    def edit(record: dict[str, Any]) -> None:
        name = min(one for one, entry in tensors(record["converted"]).items() if entry[1] == [96])
        tensors(record["converted"])[name][1] = [size]

    edit_json(tmp_path / "there" / "mopt.json", edit)
    done = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--dry-run")
    assert done.report is not None
    assert "record.content" in {one["code"] for one in done.report["warnings"]}
