"""``--calibration``: input scales of a base that is quantized here, and what of CALIB is refused."""

import json
import math
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from calibrated import TINY, damage, edit_calibration, edit_whole
from safetensors.torch import load_file
from support import Outcome, Tensors, copy, edit, run_mopt, tree

from modelopt_convert.checkpoint.calibration import CalibrationFolder, read_calibration
from modelopt_convert.engines.limits import limits
from modelopt_convert.engines.sglang import dynamic_words
from modelopt_convert.plan.from_base import input_scale
from modelopt_convert.run.errors import InputError

FORMATS = {"build-nvfp4": ("nvfp4", 2688.0), "convert-fp8": ("fp8", 448.0)}
BLOCK = "transformer_blocks.0."


def build(calib: Path, output: Path, *more: str | Path, command: str = "build-nvfp4", base: Path = TINY) -> Outcome:
    words = ("--preset", "flux1-dev", "--base", base, "--calibration", calib, "--output", output)
    return run_mopt(command, *words, *more)


@pytest.fixture(scope="module")
def builds(calib: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """OUT and report, by command."""
    found = {}
    for command in FORMATS:
        output = tmp_path_factory.mktemp(command) / "out"
        made = build(calib, output, command=command)
        assert made.exit_code == 0 and made.report is not None, made.stderr
        found[command] = output, made.report
    return found


@pytest.mark.parametrize("command", FORMATS)
def test_scales_are_amax_times_headroom(
    command: str, builds: dict[str, tuple[Path, dict[str, Any]]], calib: Path
) -> None:
    output, report = builds[command]
    said = json.loads((calib / "calibration.json").read_text())
    modules = said["transformers"]["transformer"]["modules"]
    tensors = load_file(output / "diffusion_pytorch_model.safetensors")
    packed = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    largest = FORMATS[command][1]
    assert said["headroom"] == 2 and len(packed) > 20
    for name in packed:
        wanted = struct.pack("<f", modules[name]["amax"] * 2 / largest)
        assert tensors[f"{name}.input_scale"].numpy().tobytes() == wanted
    assert report["calibration"] == "inputs" and report["proof"]["words"] == "quantized here, inputs calibrated"
    codes = {one["code"] for one in report["warnings"]}
    assert not codes & {"build.uncalibrated", "engine.dynamic_input_scale"}


@pytest.mark.parametrize("command", FORMATS)
def test_engines_take_the_scales_and_their_limits_of_dynamic_inputs_are_gone(
    command: str, builds: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    algorithm = FORMATS[command][0]
    output, _ = builds[command]
    config = json.loads((output / "config.json").read_text())
    plain = run_mopt(command, "--preset", "flux1-dev", "--base", TINY, "--output", tmp_path / "out")
    assert plain.exit_code == 0
    other = json.loads((tmp_path / "out" / "config.json").read_text())
    lost = dynamic_words(other) or next(one.words for one in limits(other, algorithm) if one.dynamic)
    assert lost in (tmp_path / "out" / "README.md").read_text()
    assert (dynamic_words(config) or lost) not in (output / "README.md").read_text()
    assert not any(one.dynamic for one in limits(config, algorithm))
    keys = config["quantization_config"]
    assert keys["quant_method"] == "modelopt" and "ignored_layers" not in keys
    assert keys["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    looked = run_mopt("inspect", output, "--all")
    assert looked.report is not None and not {one["code"] for one in looked.report["lint"]} & {
        "input_scale.dynamic", "input_scale.odd",
    }  # fmt: skip


@pytest.mark.parametrize("command", FORMATS)
def test_verify_proves_it_and_says_what_its_record_claims(
    command: str, builds: dict[str, tuple[Path, dict[str, Any]]], calib: Path
) -> None:
    output, _ = builds[command]
    record = json.loads((output / "mopt.json").read_text())
    assert record["calibration"]["digest"] == read_calibration(calib).digest
    proven = run_mopt("verify", output, "--base", TINY, "--device", "cpu")
    assert proven.exit_code == 0 and proven.report is not None and proven.report["verify"]["proof"] == "proven"
    alone = run_mopt("verify", output, "--device", "cpu", json_report=False)
    assert alone.exit_code == 0 and "with input scales of `mopt calibrate`" in alone.stdout
    assert "Inputs: calibrated" in (output / "README.md").read_text()
    assert "NOT calibrated" not in (output / "README.md").read_text()


@pytest.mark.parametrize("to", ["comfyui", "compressed-tensors"])
def test_other_dialects_carry_the_scales(to: str, calib: Path, tmp_path: Path) -> None:
    made = build(calib, tmp_path / "out", "--to", to, "--inexact", "bf16")
    assert made.exit_code == 0 and made.report is not None, made.stderr
    back = run_mopt("convert", tmp_path / "out", tmp_path / "back", "--to", "modelopt", "--base", TINY)
    assert back.exit_code == 0, back.stderr
    assert build(calib, tmp_path / "plain").exit_code == 0
    there, here = ({
        name: float(value)
        for file in (tmp_path / folder).glob("*.safetensors")
        for name, value in load_file(file).items()
        if name.endswith(".input_scale")
    } for folder in ("back", "plain"))  # fmt: skip
    assert there and there.keys() <= here.keys()
    assert all(math.isclose(there[name], here[name], rel_tol=1e-6) for name in there)


def test_a_group_with_one_scale_takes_the_largest(calib: Path, tmp_path: Path) -> None:
    def apart(said: dict[str, Any]) -> None:
        modules = said["transformers"]["transformer"]["modules"]
        modules[f"{BLOCK}attn.to_q"]["amax"], modules[f"{BLOCK}attn.to_k"]["amax"] = 40.0, 80.0

    edited = edit_whole(copy(calib, tmp_path / "calib"), apart)
    for command, expected in (("build-nvfp4", (80, 80, 80)), ("convert-fp8", (40, 80, None))):
        assert build(edited, tmp_path / command, command=command).exit_code == 0
        tensors = load_file(tmp_path / command / "diffusion_pytorch_model.safetensors")
        for part, amax in zip("qkv", expected, strict=True):
            if amax is not None:
                found = tensors[f"{BLOCK}attn.to_{part}.input_scale"]
                assert float(found) == input_scale(amax, 2.0, FORMATS[command][1])


def test_every_module_without_an_amax_is_named_at_once(calib: Path, tmp_path: Path) -> None:
    names = [f"{BLOCK}attn.to_{part}" for part in "qkv"] + ["transformer_blocks.1.attn.to_q", "proj_out"]

    def lame(said: dict[str, Any]) -> None:
        modules = said["transformers"]["transformer"]["modules"]
        modules[names[0]] |= {"n": 0, "amax": None}
        modules[names[1]]["amax"] = 0.0
        modules[names[2]]["amax"] = 2.0**121
        del modules[names[3]]
        del modules[names[4]]  # kept in BF16: nobody asks for it

    edited = edit_whole(copy(calib, tmp_path / "calib"), lame)
    found = build(edited, tmp_path / "out")
    assert found.exit_code == 3 and found.report is not None and not (tmp_path / "out").exists()
    faults = {one["code"]: one["names"] for one in found.report["error"]["faults"]}
    assert faults == {
        "calibration.never_ran": [names[0]], "calibration.amax": names[1:3], "calibration.no_module": [names[3]],
    }  # fmt: skip
    assert f"--keep-bf16 '{names[1]}'" in found.message


def test_a_calibration_of_another_base_is_refused(calib: Path, tmp_path: Path) -> None:
    def tuned(tensors: Tensors) -> None:
        tensors["proj_out.bias"][0] += 1

    def fewer(tensors: Tensors) -> None:
        del tensors["proj_out.bias"]

    other = edit(TINY / "transformer", tmp_path / "tuned", tuned)
    found = build(calib, tmp_path / "out", base=other)  # known once all of it was read
    assert found.error_code == "calibration.other_base" and "content_xxh3_128" in found.message
    other = edit(TINY / "transformer", tmp_path / "fewer", fewer)
    found = build(calib, tmp_path / "out", "--dry-run", base=other)
    assert found.error_code == "calibration.other_base" and "headers_sha256" in found.message
    assert not (tmp_path / "out").exists()


def test_the_transformer_of_a_pipeline_of_two_is_found_by_its_name(calib: Path, tmp_path: Path) -> None:
    def two(said: dict[str, Any]) -> None:
        said["transformers"] = {"transformer_2": said["transformers"]["transformer"], "transformer_3": {
            "base": {}, "modules": {}}}  # fmt: skip

    folder = read_calibration(edit_whole(copy(calib, tmp_path / "calib"), two))
    assert folder.of("transformer_2").amax == read_calibration(calib).of(None).amax
    with pytest.raises(InputError) as refused:
        folder.of(None)
    assert refused.value.code == "calibration.no_transformer"


def test_what_is_no_calibration_is_refused(calib: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "gone", tmp_path / "out").error_code == "calibration.missing"
    assert build(TINY, tmp_path / "out").error_code == "calibration.missing"
    assert build(calib, tmp_path / "out", "--export", TINY).exit_code == 2
    assert build(Path("hf://a/b"), tmp_path / "out").exit_code == 2
    assert build(calib, calib / "out").error_code == "output.inside_input"


@pytest.mark.parametrize(
    "change",
    [
        {"headroom": 0.5}, {"headroom": "x"}, {"headroom": 1e30}, {"schema": "mopt.calibration/2"},
        {"transformers": {}}, {"transformers": []}, {"transformers": {"transformer": {"base": 1, "modules": {}}}},
        {"transformers": {"transformer": {"base": {}, "modules": {"a": {"n": 1}}}}}, {"stats_xxh3_128": "0"},
    ],
)  # fmt: skip
def test_fields_that_nobody_wrote_are_refused(change: dict[str, Any], calib: Path, tmp_path: Path) -> None:
    edited = edit_calibration(copy(calib, tmp_path / "calib"), lambda said: said.update(change))
    with pytest.raises(InputError) as refused:
        read_calibration(edited)
    assert refused.value.code == "calibration.damaged"


def test_damage_anywhere_is_refused_or_changes_nothing(calib: Path, tmp_path: Path) -> None:
    draw, whole = random.Random(1), read_calibration(calib)
    refused = 0
    for number in range(300):
        place = copy(calib, tmp_path / str(number))
        words = damage(place, draw)
        try:
            found: CalibrationFolder | None = read_calibration(place)
        except InputError as error:
            assert error.path is not None and error.hint and "\n" not in error.message, words
            found, refused = None, refused + 1
        if found is not None:
            same = found.said == whole.said and found.of(None).amax == whole.of(None).amax
            assert same and "mopt.json" in words, words
        shutil.rmtree(place)
    assert refused > 200
    assert tree(calib)


def test_a_record_that_was_changed_anywhere_is_told(calib: Path, tmp_path: Path) -> None:
    copied = copy(calib, tmp_path / "calib")
    record = copied / "mopt.json"
    raw = record.read_text()
    digest = next(iter(json.loads(raw)["digests"]["tensors"].values()))
    for changed, words in (
        (raw.replace(digest, digest[::-1]), "found another"),
        (raw[:-3], "found one that is damaged"),
    ):
        record.write_text(changed)
        with pytest.raises(InputError, match=words) as refused:
            read_calibration(copied)
        assert refused.value.code == "calibration.damaged" and "mopt.json" in refused.value.message
