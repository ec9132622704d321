"""Odd, broken and rare input to `mopt inspect`; and SGLang's view where it departs from what one would expect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_files import (
    MODELOPT,
    ODD,
    WEIGHTS,
    _marker,
    _nvfp4_modules,
    modelopt_fp8,
    modelopt_postprocessed,
    write_file,
    write_folder,
)
from sglang_files import MODELOPT as SIZED
from sglang_files import SWAPPED, SWIZZLED, UNPACKED, UNSIZED, believed, layout, marker, packed, tensor
from support import run_mopt


def test_a_postprocessed_file_on_its_own_is_not_comfyuis(tmp_path: Path) -> None:
    """The header says quant_method modelopt; formats.md 1c: low, not swapped."""
    report = run_mopt("inspect", modelopt_postprocessed(tmp_path / "x") / WEIGHTS).report
    assert report is not None
    assert report["dialect"]["name"] == "modelopt-postprocessed"
    assert report["layout"]["nibble_order"] != "high"


def test_linear_scales_padded_in_columns_are_padded(tmp_path: Path) -> None:
    tensors = _nvfp4_modules()
    scale = tensors[f"{ODD}.weight_scale"].view(torch.uint8)
    tensors[f"{ODD}.weight_scale"] = torch.nn.functional.pad(scale, (0, 10)).view(torch.float8_e4m3fn)  # 6 to 16
    report = run_mopt("inspect", write_folder(tmp_path / "x", tensors, {"quantization_config": MODELOPT})).report
    assert report is not None
    assert ("shape.padded", ODD) in {(fault["code"], fault["module"]) for fault in report["lint"]}


def test_quantized_in_an_unknown_way_is_not_unquantized(tmp_path: Path) -> None:
    gptq = {"a.qweight": torch.zeros(4, 8, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32)}
    report = run_mopt(
        "inspect", write_folder(tmp_path / "x", gptq, {"quantization_config": {"quant_method": "gptq"}})
    ).report
    assert report is not None and report["dialect"]["name"] == "unknown"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_torchao_fp8_holds_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    """INT8 weight-only, and NVFP4Tensor without per_tensor_scale (qdata, scale), are written under the same names."""
    tensors = {"a._weight_qdata": torch.zeros(32, 16, dtype=dtype), "a._weight_scale": torch.ones(32, 1)}
    report = run_mopt("inspect", write_folder(tmp_path / "x", tensors, {})).report
    assert report is not None and report["dialect"]["name"] != "torchao-fp8"


@pytest.mark.parametrize(
    ("keys", "header"),
    [
        ({"checkpoint_weight_scale_layout": []}, {}),
        ({"checkpoint_weight_scale_layout": {}}, {}),
        ({"ignore": 5}, {}),
        ({}, {"_quantization_metadata": json.dumps({"layers": {"x": {"format": ["nvfp4"]}}})}),
        ({}, {"_quantization_metadata": "[" * 100_000}),
    ],
)
def test_odd_values_are_data(keys: dict[str, Any], header: dict[str, str], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", _nvfp4_modules(), {"quantization_config": {**MODELOPT, **keys}}, header)
    outcome = run_mopt("inspect", source)
    assert (outcome.exit_code, outcome.error_code) == (0, None)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros((), dtype=torch.bfloat16)])
def test_a_global_scale_of_the_wrong_kind_is_lint(value: torch.Tensor, tmp_path: Path) -> None:
    tensors = {**_nvfp4_modules(), f"{ODD}.weight_scale_2": value}
    report = run_mopt("inspect", write_folder(tmp_path / "x", tensors, {"quantization_config": MODELOPT})).report
    assert report is not None and [fault for fault in report["lint"] if fault["module"] == ODD]


def test_fp8_modules_are_linted_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = modelopt_fp8(tmp_path / "x")
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{ODD}.input_scale"]
    tensors[f"{ODD}.weight_scale"] = torch.tensor(0.0)
    save_file(tensors, folder / WEIGHTS)
    report = run_mopt("inspect", folder).report
    assert report is not None and report["lint"]


def test_sglang_raises_without_a_group_size() -> None:
    assert believed(packed(), UNSIZED).refuses


def test_sglang_ignores_the_header_where_modules_are_packed() -> None:
    """Folder given as a component: config.json, then the tensors; the header is never asked."""
    assert layout(believed(packed(), None, {"quantization_config": SIZED | SWAPPED | SWIZZLED})) == ("low", "linear")


@pytest.mark.parametrize("evidence", [marker(), tensor("double_blocks.0.img_attn.qkv.weight", "BF16", (4, 4))])
def test_names_and_markers_count_only_beside_a_module_that_sglang_sees_as_packed(evidence: Any) -> None:
    assert layout(believed(UNPACKED | evidence, SIZED)) == ("low", "linear")
    assert layout(believed(packed(scale_dtype="U8") | evidence, SIZED)) == ("low", "linear")


def test_sglang_takes_quant_method_modelopt_fp4() -> None:
    assert layout(believed(packed(), SIZED | {"quant_method": "modelopt_fp4"} | SWAPPED)) == ("high", "linear")


@pytest.mark.parametrize("keys", [{"quant_algo": "FP8"}, {"quant_method": "torchao"}])
def test_sglang_infers_nvfp4_only_where_nothing_else_is_declared(keys: dict[str, str]) -> None:
    assert not believed(packed(), SIZED | keys).quantized


def test_int8_files_of_comfyui_have_no_row(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": torch.tensor(1.0)}
    report = run_mopt(
        "inspect", write_file(tmp_path / "x", tensors | {"a.comfy_quant": _marker("int8_tensorwise")})
    ).report
    assert report is not None and report["dialect"]["name"].startswith("comfyui")
