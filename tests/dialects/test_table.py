"""mopt inspect names every dialect by its evidence, and says what SGLang would take it for. The files are in code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_files import (
    EVEN,
    FILES,
    MAKERS,
    MODELOPT,
    ODD,
    SHAPES,
    WEIGHTS,
    bfl,
    comfyui,
    comfyui_both,
    comfyui_header,
    modelopt,
    modelopt_fp8,
    modelopt_header,
    modelopt_postprocessed,
    modelopt_svd,
    unlabelled_nvfp4,
    unquantized,
    write_file,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import inspected, misreads, run_mopt

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.dialect import Dialect, Headers
from modelopt_convert.dialects.table import DIALECTS, detect_dialect

Maker = Callable[[Path], Path]
ORDER = [one.name for one in DIALECTS]

# Rows of the table that are true of a dialect of their own and of more special ones, which must be asked first.
MODELOPT_ROWS = {"modelopt", "modelopt-postprocessed", "modelopt-fp8", "modelopt-llm", "bfl-package"}
NVFP4_ROWS = {"bfl", "comfyui", "comfyui-header", "lightx2v", "modelopt-other", *MODELOPT_ROWS} - {"modelopt-fp8"}
FP8_ROWS = {"modelopt-fp8", "comfyui-fp8", "comfyui-fp8-legacy", "comfyui-mxfp8", "deepseek-fp8"}
NO_PLAIN_NAMES = {"compressed-tensors", "mxfp4", "nunchaku", "torchao", "torchao-fp8"}
ALSO_TRUE_OF = {
    "comfyui-header": {"bfl", "comfyui"},
    "comfyui-fp8": {"comfyui-mxfp8"},
    "torchao-fp8": {"torchao"},
    "modelopt-llm": {"bfl-package"},
    "modelopt": MODELOPT_ROWS - {"modelopt-fp8"},
    "modelopt-other": MODELOPT_ROWS,
    "nvfp4-unlabelled": NVFP4_ROWS,
    "fp8-unlabelled": FP8_ROWS,
    "unquantized": NO_PLAIN_NAMES,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every file, by its maker's name."""
    root = tmp_path_factory.mktemp("dialects")
    return {maker.__name__: maker(root / maker.__name__) for _, maker in MAKERS}


def look(source: Path) -> Headers:
    with CheckpointReader(source, need_config=False) as reader:
        return Headers(reader.tensors, reader.metadata, reader.config, reader.skipped)


def test_every_row_of_the_table_has_a_file() -> None:
    assert set(ORDER) == FILES.keys()
    assert len(ORDER) == len(FILES)


@pytest.mark.parametrize(("dialect", "maker"), MAKERS, ids=lambda item: getattr(item, "__name__", item))
def test_the_dialect_is_named_with_evidence(dialect: str, maker: Maker, sources: dict[str, Path]) -> None:
    report = inspected(sources[maker.__name__])
    assert report["dialect"]["name"] == dialect
    assert report["dialect"]["evidence"] and all(report["dialect"]["evidence"])
    assert report["components"]["."]["dialect"] == report["dialect"]


@pytest.mark.parametrize("asked", DIALECTS, ids=ORDER)
def test_each_recogniser_says_no_to_the_other_dialects(asked: Dialect, sources: dict[str, Path]) -> None:
    dialect = asked.name
    for other, maker in MAKERS:
        said = asked.recognise(look(sources[maker.__name__]))
        if other == dialect:
            assert said, f"{dialect} does not know its own {maker.__name__}"
        elif said:
            assert other in ALSO_TRUE_OF.get(dialect, ()), f"{dialect} takes {maker.__name__} for its own: {said}"
            assert ORDER.index(other) < ORDER.index(dialect), f"{other} must be asked before {dialect}"


@pytest.mark.parametrize(
    ("maker", "ending", "left"),
    [
        ("comfyui", (".comfy_quant",), "nvfp4-unlabelled"),
        ("comfyui_both", (".comfy_quant",), "comfyui-header"),
        ("comfyui_fp8", (".comfy_quant",), "fp8-unlabelled"),
        ("comfyui_mxfp8", (".comfy_quant",), "fp8-unlabelled"),
        ("comfyui_fp8_legacy", ("scaled_fp8",), "comfyui-fp8-legacy"),
        ("comfyui_fp8_legacy", ("scaled_fp8", ".scale_weight"), "fp8-unlabelled"),
        ("deepseek_fp8", (".weight_scale_inv",), "fp8-unlabelled"),
        ("lightx2v", (".alpha",), "nvfp4-unlabelled"),
        ("unlabelled_nvfp4", (".weight_scale",), "unknown"),
    ],
)
def test_without_the_evidence_the_name_is_gone(
    maker: str, ending: tuple[str, ...], left: str, sources: dict[str, Path]
) -> None:
    whole = look(sources[maker])
    tensors = {name: info for name, info in whole.tensors.items() if not name.endswith(ending)}
    assert len(tensors) < len(whole.tensors)
    assert detect_dialect(Headers(tensors, whole.metadata, whole.config, whole.other_files))[0].name == left


@pytest.mark.parametrize("with_config", [True, False])
def test_two_candidate_files_are_an_error_naming_both(tmp_path: Path, with_config: bool) -> None:
    folder = modelopt(tmp_path / "x")
    (folder / "x.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).rename(folder / "x-mixed.safetensors")
    if not with_config:
        (folder / "config.json").unlink()
    outcome = run_mopt("inspect", folder)
    assert (outcome.exit_code, outcome.error_code) == (3, "input.ambiguous")
    assert "x.safetensors" in outcome.message and "x-mixed.safetensors" in outcome.message


def test_one_of_two_candidates_is_a_source(tmp_path: Path) -> None:
    first, second = comfyui(tmp_path / "a"), comfyui_header(tmp_path / "b")
    second.rename(first.with_name("model-mixed.safetensors"))
    assert inspected(first)["dialect"]["name"] == "comfyui"
    assert inspected(first.with_name("model-mixed.safetensors"))["dialect"]["name"] == "comfyui-header"


def test_a_file_and_the_folder_it_lies_in_are_the_same_source(tmp_path: Path) -> None:
    file = comfyui(tmp_path / "x")
    assert inspected(file) == inspected(file.parent)


def test_a_pipeline_shows_each_transformer(tmp_path: Path) -> None:
    modelopt(tmp_path / "transformer")
    modelopt_fp8(tmp_path / "transformer_2")
    (tmp_path / "model_index.json").write_text("{}")
    report = inspected(tmp_path)
    assert list(report["components"]) == ["transformer", "transformer_2"]
    first, second = report["components"]["transformer"], report["components"]["transformer_2"]
    assert (first["dialect"]["name"], second["dialect"]["name"]) == ("modelopt", "modelopt-fp8")
    assert {one["algorithm"] for one in first["modules"].values()} == {"NVFP4"}
    assert {one["algorithm"] for one in second["modules"].values()} == {"FP8"}
    assert first["totals"] != second["totals"]
    assert {key: report[key] for key in first if key != "config_from"} | {"config_from": "config.json"} == first


def test_a_pipeline_is_held_against_a_pipeline(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        modelopt(tmp_path / "export" / name)
    unquantized(tmp_path / "base/transformer")
    outcome = run_mopt("inspect", tmp_path / "export", "--base", tmp_path / "base")
    assert (outcome.exit_code, outcome.error_code) == (3, "input.missing")
    assert "transformer_2" in outcome.message
    unquantized(tmp_path / "base/transformer_2")
    report = inspected(tmp_path / "export", "--base", str(tmp_path / "base"))
    # Random codes resemble no base: nothing may be called proven, in either component.
    for component in report["components"].values():
        assert component["layout"]["modules_undetermined"] == len(component["modules"]) == 2


def test_the_header_only_comfyui_file_is_misread_and_how(tmp_path: Path) -> None:
    """SGLang infers ComfyUI's layout from marker tensors alone."""
    report = inspected(comfyui_header(tmp_path / "x"))
    assert report["dialect"]["name"] == "comfyui-header"
    assert (report["layout"]["nibble_order"], report["layout"]["scale_layout"]) == ("high", "128x4")
    # Where no padding shows, the declaration is all there is.
    assert report["modules"][EVEN]["scale_layout"] == "128x4"
    assert report["modules"][EVEN]["basis"] == "declared"
    believes = report["engine"]["believes"]
    assert (believes["nibble_order"], believes["scale_layout"], believes["packed_modules"]) == ("low", "linear", 2)
    nibbles, scales = report["engine"]["misreads"]
    assert nibbles == "sglang@0.5.23 would read the low nibble as the even column, it is the high"
    assert scales == "sglang@0.5.23 would read the scales as linear, they are 128x4"
    assert misreads(report) == [nibbles, scales]


@pytest.mark.parametrize("maker", [comfyui, comfyui_both, bfl])
def test_markers_and_packed_qkv_names_are_read_right(maker: Maker, tmp_path: Path) -> None:
    """Of modules whose sizes fill tiles: where scales are padded SGLang's loader raises, see the next test."""
    file = maker(tmp_path / "x")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: one for name, one in load_file(file).items() if not name.startswith(ODD)}, file, metadata)
    report = inspected(file)
    believes = report["engine"]["believes"]
    assert (believes["nibble_order"], believes["scale_layout"], believes["group_size"]) == ("high", "128x4", 16)
    assert (report["layout"]["nibble_order"], report["layout"]["scale_layout"]) == ("high", "128x4")
    assert report["engine"]["misreads"] == misreads(report) == []
    assert all("swapped and swizzled" in reason for reason in report["engine"]["because"])


@pytest.mark.parametrize("maker", [comfyui, comfyui_both])
def test_padded_scales_are_believed_right_and_yet_not_loaded(maker: Maker, tmp_path: Path) -> None:
    report = inspected(maker(tmp_path / "x"))
    assert report["engine"]["believes"]["scale_layout"] == report["layout"]["scale_layout"] == "128x4"
    (raised,) = report["engine"]["misreads"]
    assert "raises AssertionError" in raised and "scales padded" in raised and f"1 module ({ODD} first)" in raised


def test_a_plain_export_is_read_by_the_defaults(tmp_path: Path) -> None:
    report = inspected(modelopt(tmp_path / "x"))
    believes = report["engine"]["believes"]
    assert (believes["nibble_order"], believes["scale_layout"], believes["group_size"]) == ("low", "linear", 16)
    assert report["engine"]["misreads"] == report["lint"] == []
    assert [reason for reason in report["engine"]["because"] if "defaults" in reason]


def test_a_postprocessed_export_is_misread_in_its_scales_alone(tmp_path: Path) -> None:
    """ModelOpt swizzles, does not swap, and says so nowhere; without a base the nibble order stays open."""
    report = inspected(modelopt_postprocessed(tmp_path / "x"))
    assert report["modules"][ODD]["scale_layout"] == "128x4"
    assert report["modules"][ODD]["scale_basis"] == "shape"
    assert report["layout"]["nibble_order"] == "undetermined"
    assert misreads(report) == ["sglang@0.5.23 would read the scales as linear, they are 128x4"]
    # Where nothing is padded and nothing is declared, nothing is claimed.
    ambiguous = inspected(modelopt_header(tmp_path / "y"))
    assert ambiguous["layout"]["scale_layout"] == "undetermined" and misreads(ambiguous) == []


def test_an_algorithm_that_the_engine_refuses_is_named(tmp_path: Path) -> None:
    (refusal,) = misreads(inspected(modelopt_svd(tmp_path / "x")))
    assert "refuses" in refusal and "NVFP4_SVD" in refusal


KEYS = {
    "": "schema status dialect layout components modules lint totals",
    "dialect": "name evidence",
    "layout": "nibble_order scale_layout global_scale basis modules_proven modules_undetermined modules_contradicting",
    "component": "layout modules",
    "module": "algorithm shape nibble_order scale_layout basis relative_error",
    "lint": "code message module",
    "totals": "tensors bytes by_dtype",
}
NIBBLES = {"low", "high", "undetermined", "none"}
SCALES = {"linear", "128x4", "mixed", "equivalent", "undetermined", "none"}
CONVENTIONS = {"multiply", "divide", "undetermined", "none"}
BASES = {"proven", "declared", "shape", "hint", "none"}


def check_keys(what: str, found: dict[str, Any]) -> None:
    """Fields are only added."""
    assert set(KEYS[what].split()) <= found.keys()


def check_component(component: dict[str, Any]) -> None:
    layout = component["layout"]
    check_keys("component", component)
    check_keys("layout", layout)
    assert layout["nibble_order"] in NIBBLES and layout["scale_layout"] in SCALES
    assert layout["global_scale"] in CONVENTIONS and layout["basis"] in BASES
    for key in ("modules_proven", "modules_undetermined", "modules_contradicting"):
        assert type(layout[key]) is int and 0 <= layout[key] <= len(component["modules"])
    for one in component["modules"].values():
        check_keys("module", one)
        assert one["algorithm"] in ("NVFP4", "FP8", "MXFP8") and one["basis"] in BASES
        assert len(one["shape"]) == 2 and all(type(size) is int for size in one["shape"])
        assert one["nibble_order"] in NIBBLES | {"equivalent"} and one["scale_layout"] in SCALES
        assert one["relative_error"] is None or type(one["relative_error"]) is float


@pytest.mark.parametrize("maker", [maker for _, maker in MAKERS], ids=lambda maker: maker.__name__)
def test_the_report_keeps_the_contract(maker: Maker, sources: dict[str, Path]) -> None:
    source = sources[maker.__name__]
    report = inspected(source)
    check_keys("", report)
    check_keys("dialect", report["dialect"])
    check_keys("totals", report["totals"])
    assert (report["schema"], report["status"]) == ("mopt.inspect/1", "ok")
    assert type(report["dialect"]["name"]) is str and type(report["dialect"]["evidence"]) is list
    check_component(report)
    assert list(report["components"]) == ["."]
    check_component(report["components"]["."])
    for fault in report["lint"]:
        check_keys("lint", fault)
        assert type(fault["code"]) is str and type(fault["message"]) is str
        assert fault["module"] is None or type(fault["module"]) is str
    tensors = load_file(source if source.is_file() else source / WEIGHTS)
    totals = report["totals"]
    assert totals["tensors"] == len(tensors) == sum(one["tensors"] for one in totals["by_dtype"].values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert totals["bytes"] == size == sum(one["bytes"] for one in totals["by_dtype"].values())


def test_logical_shapes_are_of_the_unpacked_weights(tmp_path: Path) -> None:
    for maker in (modelopt, comfyui, modelopt_fp8):
        modules = inspected(maker(tmp_path / maker.__name__))["modules"]
        assert {name: tuple(one["shape"]) for name, one in modules.items()} == SHAPES


def test_json_is_one_ascii_line(tmp_path: Path) -> None:
    strange = write_file(tmp_path / "x", {"n\u00f6rm\n\u2028.weight": torch.ones(2, dtype=torch.uint8).view(1, 2)})
    outcome = run_mopt("inspect", strange)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.stdout.isascii() and outcome.stdout.count("\n") == 1 and outcome.stdout.endswith("}\n")
    assert [fault["module"] for fault in outcome.report["lint"]] == ["n\u00f6rm\n\u2028"]


def test_people_are_told_the_same(tmp_path: Path) -> None:
    outcome = run_mopt("inspect", comfyui_header(tmp_path / "x"), json_report=False)
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith("comfyui-header, ")
    assert "believes: low nibble first, scales linear" in outcome.stdout
    assert outcome.stdout.count("[engine.misread]") == 2


def test_a_missing_source_and_an_unknown_engine_are_not_data(tmp_path: Path) -> None:
    outcome = run_mopt("inspect", tmp_path / "nowhere")
    assert (outcome.exit_code, outcome.error_code) == (3, "input.missing")
    assert run_mopt("inspect", unlabelled_nvfp4(tmp_path / "x"), "--engine", "vllm").exit_code == 2


def test_declared_keys_are_shown_as_declared(tmp_path: Path) -> None:
    folder = modelopt(tmp_path / "x")
    said = {**MODELOPT, "swap_weight_nibbles": True, "checkpoint_weight_scale_layout": "swizzled"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    report = inspected(folder)
    assert report["modules"][EVEN]["nibble_order"] == "high" and report["modules"][EVEN]["basis"] == "declared"
    assert report["modules"][EVEN]["scale_layout"] == "128x4"
    # The shape of the other module's scales leaves no room for what is declared.
    assert report["modules"][ODD]["scale_layout"] == "linear" and report["modules"][ODD]["scale_basis"] == "shape"
    assert report["layout"]["scale_layout"] == "mixed" and report["layout"]["modules_contradicting"] == 1
    assert misreads(report) == ["sglang@0.5.23 reads all scales as 128x4, they are mixed"]
