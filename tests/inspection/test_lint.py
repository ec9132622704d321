"""Faults planted one at a time in a real export: mopt inspect names each by its code and its module, and exits 0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import Tensors, config_of, edit, inspected, load, misreads, packed_in

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ALONE = "single_transformer_blocks.1.proj_mlp"  # no sibling that its scales would have to agree with
ATTENTION = "transformer_blocks.0.attn"
UNPACKED = "context_embedder"

Change = Callable[[Tensors], object]
Lint = set[tuple[str, str | None]]


def lint_of(report: dict[str, Any]) -> Lint:
    return {(fault["code"], fault["module"]) for fault in report["lint"]}


def put(name: str, row: int, column: int, byte: int) -> Change:
    """Set one block scale."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[row, column] = byte

    return change


def scaled(name: str, factor: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] * factor

    return change


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def with_header(source: Path, target: Path, metadata: dict[str, str]) -> Path:
    """A copy of the export whose header holds this metadata too."""
    folder = edit(source, target)
    (file,) = folder.glob("*.safetensors")
    save_file(load(folder), file, {"format": "pt", **metadata})
    return folder


@pytest.mark.parametrize("variant", ["nvfp4", "nvfp4_fp16", "nvfp4_compressed"])
def test_an_unharmed_export_has_no_lint(exports: Path, base: Path, variant: str) -> None:
    for more in ([], ["--all"], ["--base", base]):
        report = inspected(exports / variant, *more)
        assert report["lint"] == []
        assert report["layout"]["modules_contradicting"] == 0
        assert report["layout"]["modules_proven"] == (40 if base in more else 0) and len(report["modules"]) == 40


PLANTED: dict[str, tuple[Change, Lint]] = {
    "NaN": (put(f"{ALONE}.weight_scale", 77, 3, 0x7F), {("scale.nan", ALONE)}),
    "negative NaN": (put(f"{ALONE}.weight_scale", 0, 0, 0xFF), {("scale.nan", ALONE)}),
    "zero": (put(f"{ALONE}.weight_scale", 639, 9, 0), {("scale.zero", ALONE)}),
    "no block scales": (without(f"{ALONE}.weight_scale"), {("scale.missing", ALONE)}),
    "no input_scale": (without(f"{ALONE}.input_scale"), {("input_scale.missing", ALONE)}),
    "no weight_scale_2": (without(f"{ALONE}.weight_scale_2"), {("global_scale.missing", ALONE)}),
    "zero weight_scale_2": (scaled(f"{ALONE}.weight_scale_2", 0.0), {("scale.unusable", ALONE)}),
    "negative weight_scale_2": (scaled(f"{ALONE}.weight_scale_2", -1.0), {("scale.unusable", ALONE)}),
    "infinite weight_scale_2": (scaled(f"{ALONE}.weight_scale_2", float("inf")), {("scale.unusable", ALONE)}),
    "NaN input_scale": (scaled(f"{ALONE}.input_scale", float("nan")), {("scale.unusable", ALONE)}),
    "siblings differ": (scaled(f"{ATTENTION}.to_k.weight_scale_2", 2.0), {("fused.global_scale", ATTENTION)}),
    "added siblings differ": (
        scaled(f"{ATTENTION}.add_v_proj.weight_scale_2", 1.001),
        {("fused.global_scale", ATTENTION)},
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_nothing_else_is(fault: str, nvfp4: Path, tmp_path: Path) -> None:
    change, expected = PLANTED[fault]
    assert lint_of(inspected(edit(nvfp4, tmp_path / "planted", change), "--all")) == expected


@pytest.mark.parametrize("fault", ["NaN", "zero", "no block scales", "no weight_scale_2", "zero weight_scale_2"])
def test_a_base_neither_hides_a_fault_nor_trips_over_it(fault: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    change, expected = PLANTED[fault]
    report = inspected(edit(nvfp4, tmp_path / "planted", change), "--base", base)
    assert lint_of(report) == expected
    assert report["layout"]["modules_proven"] >= 39


def test_messages_count_the_broken_scales_and_name_the_siblings(nvfp4: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{ALONE}.weight_scale"].view(torch.uint8)[5, :7] = 0xFF
        tensors[f"{ALONE}.weight_scale"].view(torch.uint8)[6, :3] = 0
        tensors[f"{ATTENTION}.to_q.weight_scale_2"] *= 2

    messages = {
        fault["code"]: fault["message"] for fault in inspected(edit(nvfp4, tmp_path / "x", change), "--all")["lint"]
    }
    assert messages["scale.nan"].startswith("7 ") and messages["scale.zero"].startswith("3 ")
    assert "to_q, to_k, to_v" in messages["fused.global_scale"]


def test_an_uncalibrated_export_lacks_every_input_scale(exports: Path) -> None:
    report = inspected(exports / "nvfp4_uncalibrated")
    assert lint_of(report) == {("input_scale.missing", module) for module in report["modules"]}
    assert len(report["modules"]) == 40


def test_only_some_modules_are_looked_into_unless_all_are_asked_for(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def break_all(tensors: Tensors) -> None:
        for module in packed_in(tensors):
            put(f"{module}.weight_scale", 1, 1, 0x7F)(tensors)

    broken = edit(nvfp4, tmp_path / "all", break_all)
    sampled = {module for code, module in lint_of(inspected(broken)) if code == "scale.nan"}
    modules = set(packed_in(load(broken)))
    assert 0 < len(sampled) < len(modules) == 40
    assert {module for code, module in lint_of(inspected(broken, "--all")) if code == "scale.nan"} == modules
    module = max(modules - sampled)
    one = edit(nvfp4, tmp_path / "one", put(f"{module}.weight_scale", 1, 1, 0x7F))
    assert lint_of(inspected(one)) == set()
    assert lint_of(inspected(one, "--all")) == lint_of(inspected(one, "--base", base)) == {("scale.nan", module)}


def ignoring(change: Callable[[list[str]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: change(config["quantization_config"]["ignore"])


def test_ignore_that_lists_a_packed_module(nvfp4: Path, tmp_path: Path) -> None:
    listed = edit(nvfp4, tmp_path / "a", None, ignoring(lambda ignore: ignore.append(ALONE)))
    assert lint_of(inspected(listed)) == {("ignore.lists_packed", ALONE)}
    covered = edit(nvfp4, tmp_path / "b", None, ignoring(lambda ignore: ignore.append(f"{ATTENTION}.add_*")))
    leaves = ("add_q_proj", "add_k_proj", "add_v_proj")
    assert lint_of(inspected(covered)) == {("ignore.lists_packed", f"{ATTENTION}.{leaf}") for leaf in leaves}


def test_ignore_that_misses_an_unpacked_module(nvfp4: Path, tmp_path: Path) -> None:
    missed = edit(nvfp4, tmp_path / "a", None, ignoring(lambda ignore: ignore.remove(UNPACKED)))
    assert lint_of(inspected(missed)) == {("ignore.misses_unpacked", UNPACKED)}
    # Norms and biases are in no `ignore`, and need not be.
    everything = edit(nvfp4, tmp_path / "b", None, ignoring(lambda ignore: ignore.clear()))
    tensors = load(nvfp4 / "transformer")
    linears = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.dtype == torch.bfloat16
    }
    assert linears and lint_of(inspected(everything)) == {("ignore.misses_unpacked", module) for module in linears}


def test_a_flat_config_where_comfyui_expects_layers(nvfp4: Path, tmp_path: Path) -> None:
    """SGLang's builder writes it there, and ComfyUI's reader, SGLang's own copy of it included, raises."""
    flat = json.dumps(config_of(nvfp4 / "transformer")["quantization_config"])
    report = inspected(with_header(nvfp4, tmp_path / "flat", {"_quantization_metadata": flat}))
    assert lint_of(report) == {("metadata.clash", None)}
    assert "diffusion_pytorch_model.safetensors" in report["lint"][0]["message"]
    # ModelOpt's own post-processing writes layers, and the flat config under another key.
    layers = json.dumps({"format_version": "1.0", "layers": {ALONE: {"format": "nvfp4"}}})
    both = {"_quantization_metadata": layers, "quantization_config": flat}
    assert lint_of(inspected(with_header(nvfp4, tmp_path / "layers", both))) == set()


def test_modelopts_own_padding_and_swizzling(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """One test, because importing ModelOpt takes longer than all the others here."""
    from modelopt.torch.export.diffusers_utils import pad_nvfp4_weights, swizzle_nvfp4_scales

    swizzled = edit(nvfp4, tmp_path / "swizzled", swizzle_nvfp4_scales)
    modules = set(packed_in(load(swizzled)))
    for more in ([], ["--base", base]):
        report = inspected(swizzled, *more)
        assert lint_of(report) == {("shape.padded", module) for module in modules} | {("engine.misread", None)}
        assert misreads(report) == ["sglang@0.5.23 would read the scales as linear, they are 128x4"]
        assert report["layout"]["scale_layout"] == "128x4" and report["layout"]["modules_contradicting"] == 40
    assert report["layout"]["modules_proven"] == 40 and report["layout"]["nibble_order"] == "low"

    # Columns padded to 16, and nothing else: (160, 80) codes with (160, 16) scales.
    columns = edit(nvfp4, tmp_path / "columns", lambda tensors: pad_nvfp4_weights(tensors, "row_col"))
    for more in ([], ["--base", base]):
        report = inspected(columns, *more)
        assert misreads(report) == ["sglang@0.5.23 would read groups of 10, they are of 16"]
        assert report["engine"]["believes"]["group_size"] == 10
        assert report["layout"]["scale_layout"] == "linear"

    # Rows padded to 16, which the bias tells.
    def cut(tensors: Tensors) -> None:
        for role in ("weight", "weight_scale", "bias"):
            tensors[f"{ALONE}.{role}"] = tensors[f"{ALONE}.{role}"][:630].clone()

    def cut_and_pad(tensors: Tensors) -> None:
        cut(tensors)
        pad_nvfp4_weights(tensors, "row")

    report = inspected(edit(nvfp4, tmp_path / "rows", cut_and_pad))
    assert lint_of(report) == {("shape.padded", ALONE)}
    assert report["lint"][0]["message"] == "[640, 80] stored for [630, 160]"
    assert report["modules"][ALONE]["shape"] == [630, 160]
    assert lint_of(inspected(edit(nvfp4, tmp_path / "cut", cut))) == set()


def test_a_module_split_over_shards_is_taken_for_unquantized(nvfp4: Path, tmp_path: Path) -> None:
    """SGLang looks for the block scale in the file of the weight."""
    folder = edit(nvfp4, tmp_path / "x")
    tensors = load(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    scale = f"{ALONE}.weight_scale"
    first, second = (f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file({scale: tensors.pop(scale)}, folder / second, {"format": "pt"})
    save_file(tensors, folder / first, {"format": "pt"})
    weight_map = dict.fromkeys(tensors, first) | {scale: second}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    report = inspected(folder)
    assert lint_of(report) == {("module.split", ALONE), ("engine.misread", None)}
    assert misreads(report) == [f"sglang@0.5.23 would take 1 packed modules for unquantized ({ALONE} first)"]
    assert report["engine"]["believes"]["packed_modules"] == 39 and len(report["modules"]) == 40


def test_modelopts_own_shards_split_modules(exports: Path, base: Path) -> None:
    folder = exports / "nvfp4_sharded/transformer"
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    modules = packed_in(load(folder))
    split = {module for module in modules if places[f"{module}.weight"] != places[f"{module}.weight_scale"]}
    assert split
    for more in ([], ["--all"], ["--base", base]):
        report = inspected(folder, *more)
        assert lint_of(report) == {("module.split", module) for module in split} | {("engine.misread", None)}


def test_a_base_without_the_module_is_lint_and_the_rest_is_proven(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    poorer = edit(base, tmp_path / "base", without(f"{ALONE}.weight"))
    report = inspected(nvfp4, "--base", poorer)
    assert lint_of(report) == {("base.no_counterpart", ALONE)}
    assert report["layout"]["modules_proven"] == 39 and report["modules"][ALONE]["basis"] != "proven"


@pytest.mark.parametrize("role", ["pre_quant_scale", "svdquant_lora_a"])
def test_what_awq_and_svdquant_leave_is_named_whatever_the_config_says(nvfp4: Path, tmp_path: Path, role: str) -> None:
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update({f"{ALONE}.{role}": torch.ones(160)}))
    report = inspected(export)
    assert config_of(export)["quantization_config"]["quant_algo"] == "NVFP4"
    assert lint_of(report) == {("export.transformed", ALONE)}
    (message,) = (fault["message"] for fault in report["lint"])
    assert role in message and "SVDQuant" in message and "mopt convert" in message


@pytest.mark.parametrize(("variant", "roles"), [("nvfp4_awq", 1), ("nvfp4_svd", 3)])
def test_exports_of_awq_and_svdquant_are_named(transformed_exports: Path, variant: str, roles: int) -> None:
    report = inspected(transformed_exports / variant)
    assert [fault["code"] for fault in report["lint"]].count("export.transformed") == roles
    assert all(fault["message"].startswith("50 modules have") for fault in report["lint"][-roles:])
