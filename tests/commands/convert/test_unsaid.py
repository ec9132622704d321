"""What a file leaves unsaid: markers without a format, scales that are missing or rounded, formats without a proof."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Outcome, Tensors, edit, inspected, load, run_mopt, same_bits

Q = "single_transformer_blocks.0.attn.to_q"


def codes(outcome: Outcome) -> list[str]:
    assert outcome.report is not None
    return [one["code"] for one in outcome.report["warnings"]]


@pytest.fixture(scope="module")
def comfyui(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2 in NVFP4 for ComfyUI; no record is beside the file."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert run_mopt("convert", families / "flux2" / "nvfp4", out, "--to", "comfyui").exit_code == 0
    (out / "mopt.json").unlink()
    return next(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    "marker",
    [b"", bytes(32), b'{"full_precision_matrix_mult": false}'],
    ids=["no bytes", "NUL bytes", "JSON without it"],
)
def test_markers_without_a_format_are_told_and_the_tensors_read(
    marker: bytes, comfyui: Path, families: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tensors = load_file(comfyui)
    silent = torch.tensor(list(marker), dtype=torch.uint8)
    file = tmp_path / "it.safetensors"
    save_file({name: silent.clone() if name.endswith(".comfy_quant") else one for name, one in tensors.items()}, file)
    base = families / "flux2" / "base"
    done = run_mopt("convert", file, tmp_path / "out", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and done.report is not None and done.report["convert"]["proven"], done.stderr
    assert "dialect.no_format" in codes(done)
    told = next(one["message"] for one in done.report["warnings"] if one["code"] == "dialect.no_format")
    assert request.node.callspec.id in told and "nvfp4 by its tensors" in told
    wanted, found = load(families / "flux2" / "nvfp4" / "transformer"), load(tmp_path / "out")
    assert all(same_bits(wanted[name], one) for name, one in found.items())
    lint = [one for one in inspected(file)["lint"] if one["code"] == "dialect.no_format"]
    assert len(lint) == len(inspected(file)["modules"]) > 1
    shown = run_mopt("inspect", file, json_report=False).stdout
    assert shown.count("[dialect.no_format]") == 1 and f"{len(lint)} modules: no format in a marker" in shown


def without_inputs(tensors: Tensors, *modules: str) -> None:
    for name in [one for one in tensors if one.endswith(".input_scale")]:
        if not modules or name.removesuffix(".input_scale") in modules:
            del tensors[name]


def test_fp8_with_one_input_scale_missing_is_proven_and_refused_by_the_target_alone(
    exports: Path, base: Path, tmp_path: Path
) -> None:
    source = edit(exports / "fp8", tmp_path / "source", lambda tensors: without_inputs(tensors, Q))
    refused = run_mopt("convert", source, tmp_path / "no", "--to", "modelopt", "--base", base)
    assert (refused.exit_code, refused.error_code) == (3, "convert.no_input_scale")
    assert refused.stderr.count("error:") == 1 and Q in refused.stderr
    done = run_mopt("convert", source, tmp_path / "out", "--to", "torchao", "--base", base)
    assert done.exit_code == 0 and done.report is not None and done.report["convert"]["proven"], done.stderr
    assert "convert.dynamic_inputs" in codes(done)


def test_fp8_without_any_input_scale_is_told_and_declared(exports: Path, base: Path, tmp_path: Path) -> None:
    source = edit(exports / "fp8", tmp_path / "source", without_inputs)
    done = run_mopt("convert", source, tmp_path / "out", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and "convert.dynamic_inputs" in codes(done)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["dynamic_input_scale"] is True
    assert run_mopt("verify", tmp_path / "out", "--base", base).exit_code == 0
    again = run_mopt("convert", tmp_path / "out", tmp_path / "again", "--to", "comfyui", "--inexact", "bf16")
    assert "convert.dynamic_inputs" not in codes(again)  # the source says so itself


def test_scales_rounded_to_bf16_are_named_as_the_cause(exports: Path, base: Path, tmp_path: Path) -> None:
    def rounded(tensors: Tensors) -> None:
        tensors |= {name: one.bfloat16() for name, one in tensors.items() if name.endswith("_scale")}

    source = edit(exports / "fp8", tmp_path / "source", rounded)
    refused = run_mopt("convert", source, tmp_path / "out", "--to", "modelopt", "--base", base)
    assert (refused.exit_code, refused.error_code) == (1, "check.proof")
    assert refused.stderr.count("error:") == 1 and "scales are rounded to BF16" in refused.stderr
    shown = run_mopt("inspect", source, json_report=False).stdout
    many = len(inspected(source)["modules"])
    assert f"{many} modules: weight_scale is BF16" in shown and f"{many} modules: input_scale is BF16" in shown


@pytest.mark.parametrize("shape", ["rows", "three"])
def test_lint_and_convert_agree_on_scales(shape: str, exports: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        rows = tensors[f"{Q}.weight"].shape[0]
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].repeat(rows if shape == "rows" else 3)

    source = edit(exports / "fp8", tmp_path / "source", change)
    (told,) = (one["message"] for one in inspected(source)["lint"] if one["code"] == "scale.unusable")
    done = run_mopt("convert", source, tmp_path / "out", "--to", "bf16")
    assert done.exit_code == (0 if shape == "rows" else 3)
    assert ("`mopt convert` reads it" in told) is (done.exit_code == 0)


def by_row(tensors: Tensors) -> None:
    for name in [one for one in tensors if one.endswith(".weight_scale")]:
        tensors[name] = tensors[name].repeat(tensors[name.removesuffix("_scale")].shape[0])


def mxfp8(tensors: Tensors) -> None:
    without_inputs(tensors)
    for name in [one for one in tensors if one.endswith(".weight_scale")]:
        rows, columns = tensors[name.removesuffix("_scale")].shape
        tensors[name] = torch.full((rows, -(-columns // 32)), 127, dtype=torch.uint8)


@pytest.mark.parametrize("change", [by_row, mxfp8])
def test_no_command_is_printed_that_refuses_what_was_just_written(
    change: object, exports: Path, tmp_path: Path
) -> None:
    assert callable(change)
    source = edit(exports / "fp8", tmp_path / "source", change)
    done = run_mopt("convert", source, tmp_path / "out", "--to", "modelopt", json_report=False)
    assert done.exit_code == 0, done.stderr
    assert f"next: mopt inspect {tmp_path / 'out'}" in done.stdout
    refused = run_mopt("verify", tmp_path / "out", "--base", exports / "base")
    assert (refused.exit_code, refused.error_code) == (3, "dialect.formats"), refused.stderr
    assert refused.stderr.count("error:") == 1


def test_mxfp8_that_padding_alone_marks_is_read_by_it(exports: Path, tmp_path: Path) -> None:
    source = edit(exports / "fp8", tmp_path / "source", mxfp8)
    made = run_mopt("convert", source, tmp_path / "there", "--to", "comfyui", "--inexact", "bf16")
    assert made.exit_code == 0, made.stderr
    tensors = load(tmp_path / "there")
    file = tmp_path / "bare.safetensors"
    save_file({name: one for name, one in tensors.items() if not name.endswith(".comfy_quant")}, file)
    assert "128x4 (shape)" in run_mopt("inspect", file, json_report=False).stdout
    more = ("--to", "modelopt", "--config", exports / "base")
    done = run_mopt("convert", file, tmp_path / "out", *more)
    assert done.exit_code == 0, done.stderr
    marked = run_mopt("convert", tmp_path / "there", tmp_path / "wanted", *more)
    assert marked.exit_code == 0, marked.stderr
    wanted, found = load(tmp_path / "wanted"), load(tmp_path / "out")
    # Quantizer state, which the record alone has, is left out.
    assert {name for name in wanted if "_quantizer." not in name} == found.keys()
    assert all(same_bits(wanted[name], found[name]) for name in found)


def test_markers_and_sentinels_that_contradict_dtypes_are_lint(comfyui: Path, families: Path, tmp_path: Path) -> None:
    assert run_mopt("convert", families / "wan" / "fp8", tmp_path / "out", "--to", "comfyui").exit_code == 0
    tensors = load(tmp_path / "out")
    name = min(one for one in tensors if one.endswith(".comfy_quant"))
    other = tensors | {name: torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    save_file(other, tmp_path / "marker.safetensors")
    (told,) = inspected(tmp_path / "marker.safetensors")["lint"]
    assert told["code"] == "dialect.contradiction" and told["module"] == name.removesuffix(".comfy_quant")
    old = {one.replace(".weight_scale", ".scale_weight").replace(".input_scale", ".scale_input"): tensor
           for one, tensor in tensors.items() if not one.endswith(".comfy_quant")}  # fmt: skip
    for dtype, count in ((torch.float8_e5m2, 1), (torch.float8_e4m3fn, 0), (torch.float32, 0)):
        save_file({**old, "scaled_fp8": torch.zeros(2).to(dtype)}, tmp_path / "sentinel.safetensors")
        lint = inspected(tmp_path / "sentinel.safetensors")["lint"]
        assert [one["code"] for one in lint] == ["dialect.contradiction"] * count
        assert all("float8_e5m2" in one["message"] for one in lint)


def test_one_renamed_tensor_is_one_line(families: Path, tmp_path: Path) -> None:
    name = "blocks.0.norm2.bias"

    def change(tensors: Tensors) -> None:
        tensors[f"{name}x"] = tensors.pop(name)

    source = edit(families / "wan" / "nvfp4", tmp_path / "source", change)
    more = ("--to", "torchao", "--base", families / "wan" / "base")
    refused = run_mopt("convert", source, tmp_path / "out", *more)
    assert (refused.exit_code, refused.error_code) == (3, "export.missing_tensor"), refused.stderr
    assert refused.stderr.count("error:") == 1 and f"'{name}x' in place of '{name}'" in refused.stderr


def test_what_verify_says_of_sglang_convert_says_too(families: Path, tmp_path: Path) -> None:
    source, base = families / "chroma" / "nvfp4", families / "chroma" / "base"
    done = run_mopt("convert", source, tmp_path / "out", "--to", "modelopt", "--base", base)
    assert done.exit_code == 0 and "engine.fails" in codes(done), done.stderr


def test_one_order_of_a_file_without_a_config_is_rewritten_and_told(
    comfyui: Path, families: Path, tmp_path: Path
) -> None:
    base = families / "flux2" / "base"
    done = run_mopt("swap-nibbles", comfyui, tmp_path / "once", "--base", base, "--force-names")
    assert done.exit_code == 0 and "layout.undeclared" in codes(done), done.stderr
    again = run_mopt("unswizzle-scales", tmp_path / "once", tmp_path / "twice", "--base", base, "--force-names")
    assert again.exit_code == 0 and "layout.undeclared" not in codes(again), again.stderr


@pytest.mark.parametrize("says", [True, False])
def test_a_model_that_was_saved_and_not_exported_is_lint(says: bool, base: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_quantizer._amax"] = torch.tensor(5.5, dtype=torch.bfloat16)

    said = {"quant_method": "modelopt", "quant_type": "NVFP4"}
    saved = edit(
        base, tmp_path / "it", change, lambda config: config.update(quantization_config=said) if says else None
    )
    assert [one["code"] for one in inspected(saved)["lint"]] == ["export.saved"]


def test_where_presets_of_the_class_do_not_fit_hints_name_the_way_out(base: Path, tmp_path: Path) -> None:
    other = edit(base, tmp_path / "other", None, lambda config: config.update(in_channels=77))
    for more in ((), ("--preset", "flux1-dev")):
        refused = run_mopt("build-nvfp4", "--base", other, "--output", tmp_path / "out", *more)
        assert refused.exit_code == 3 and refused.error_code in ("preset.none_fits", "preset.wrong_model")
        assert "flux1-dev" in refused.stderr and "77" in refused.stderr
        assert "presets new BASE" in refused.stderr and "leave --preset out" not in refused.stderr


def test_a_base_that_lacks_a_block_is_blamed_itself(base: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [one for one in tensors if one.startswith("single_transformer_blocks.1.")]:
            del tensors[name]

    refused = run_mopt("build-nvfp4", "--base", edit(base, tmp_path / "part", change), "--output", tmp_path / "out")
    assert (refused.exit_code, refused.error_code) == (3, "base.missing_tensor"), refused.stderr
    shown = run_mopt("inspect", base, "--engines", json_report=False)
    assert "nothing here is quantized" in shown.stdout
