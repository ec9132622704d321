"""What `mopt inspect` says of FP8 and MXFP8 weights and their scales."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dialect_files import EVEN, ODD, _layers, comfyui_mxfp8, write_file
from safetensors.torch import load_file, save_file
from support import Tensors, edit, inspected, run_mopt

Q = "single_transformer_blocks.0.attn.to_q"


def unmarked(path: Path) -> Tensors:
    found = load_file(path)
    return {name: tensor for name, tensor in found.items() if not name.endswith(".comfy_quant")}


@pytest.mark.parametrize("kind", ["markers", "header", "nothing"])
def test_mxfp8_is_named_and_asked_for_no_input_scale(kind: str, tmp_path: Path) -> None:
    file = comfyui_mxfp8(tmp_path / "marked")
    modules = [name.removesuffix(".weight_scale") for name in load_file(file) if name.endswith(".weight_scale")]
    if kind != "markers":
        tensors, said = unmarked(file), _layers("mxfp8", *modules)
        file = write_file(tmp_path / kind, tensors, {"_quantization_metadata": said} if kind == "header" else None)
    report = inspected(file)
    assert report["modules"].keys() == {*modules} and report["lint"] == []
    assert {one["algorithm"] for one in report["modules"].values()} == {"MXFP8"}
    # Padding tells the order of ODD alone, where nothing else does.
    found = {name: (one["scale_layout"], one["scale_basis"]) for name, one in report["modules"].items()}
    order = ("undetermined", "none") if kind == "nothing" else ("128x4", "declared")
    assert found == {ODD: ("128x4", "shape") if kind == "nothing" else order, EVEN: order}
    shown = run_mopt("inspect", file, json_report=False)
    assert "MXFP8" in shown.stdout and order[0] in shown.stdout and "input_scale" not in shown.stdout


def test_mxfp8_is_no_pass_of_verify(tmp_path: Path) -> None:
    file = comfyui_mxfp8(tmp_path / "marked")
    base = {
        name: torch.ones(one.shape, dtype=torch.bfloat16) for name, one in unmarked(file).items() if "scale" not in name
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    refused = run_mopt("verify", file, "--base", tmp_path / "base")
    assert refused.exit_code == 3 and "mxfp8" in refused.stderr


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BF16": lambda one: one.bfloat16(),
    "three": lambda one: one.repeat(3),
    "rows": lambda one: one.repeat(160).reshape(-1, 1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_fp8_scales_that_builds_do_not_take_are_told(kind: str, exports: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_scale"] = CHANGES[kind](tensors[f"{Q}.weight_scale"])

    odd = edit(exports / "fp8", tmp_path / "odd", change)
    told = [one for one in inspected(odd)["lint"] if one["code"] == "scale.unusable"]
    assert [one["module"] for one in told] == [Q] and "mopt convert" in told[0]["message"]


def test_a_scale_of_one_element_is_none_of_these(exports: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].reshape(1)

    assert "scale.unusable" not in {
        one["code"] for one in inspected(edit(exports / "fp8", tmp_path / "odd", change))["lint"]
    }


@pytest.mark.parametrize("with_scales", [True, False])
def test_a_config_that_says_fp8_over_a_base_is_one_fault(with_scales: bool, exports: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            if tensor.dtype == torch.float8_e4m3fn:
                tensors[name] = tensor.bfloat16()
            elif name.endswith("_scale") and not with_scales:
                del tensors[name]

    lint = inspected(edit(exports / "fp8", tmp_path / "odd", change))["lint"]
    assert [one["code"] for one in lint] == ["export.nothing_quantized"] and "FP8" in lint[0]["message"]


def test_groups_whose_size_the_file_does_not_say_are_said_so(tmp_path: Path) -> None:
    from dialect_files import nvfp4

    tensors = nvfp4("blocks.0.attn.to_q", 160, 96)
    tensors["blocks.0.attn.to_q.comfy_quant"] = torch.tensor(
        list(b'{"full_precision_matrix_mult": false}'), dtype=torch.uint8
    )
    shown = run_mopt("inspect", write_file(tmp_path / "x", tensors), json_report=False)
    assert shown.exit_code == 0 and "None" not in shown.stdout


def test_scales_in_the_older_spelling_of_comfyui_are_scales(exports: Path, tmp_path: Path) -> None:
    old = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
    tensors = load_file(next((exports / "fp8").rglob("*.safetensors")))
    renamed = {f"{name.rpartition('.')[0]}.{old.get(name.rpartition('.')[2], name.rpartition('.')[2])}": one
               for name, one in tensors.items()}  # fmt: skip
    lost = min(name for name in renamed if name.endswith(".scale_weight"))
    wrong = max(name for name in renamed if name.endswith(".scale_weight"))
    renamed |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), wrong: torch.tensor(-1.0)}
    del renamed[lost]
    save_file(renamed, tmp_path / "it.safetensors")
    lint = {(one["code"], one["module"]) for one in inspected(tmp_path / "it.safetensors")["lint"]}
    told = {one for one in lint if one[0] in ("weight_scale.missing", "input_scale.missing", "scale.unusable")}
    assert told == {
        ("weight_scale.missing", lost.removesuffix(".scale_weight")),
        ("scale.unusable", wrong.removesuffix(".scale_weight")),
    }
