"""`mopt inspect --engines`: each engine's verdict on a file, against what its own loader was seen to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_files import FILES, MAKERS, bfl, comfyui, modelopt, unlabelled_fp8, unquantized, write_file
from families import FAMILIES
from faults import swap, swizzle
from kit import build, recorded
from safetensors.torch import load_file, save_file
from set_up import ENGINES
from support import Tensors, edit, edit_json, inspected, load, run_mopt

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.cli._text import table_lines
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.inspection.every_engine import engine_verdicts
from modelopt_convert.report.inspect import EngineVerdict

ALL = ["sglang", "vllm-omni", "comfyui", "diffusers", "tensorrt-llm"]
OUTCOMES = {"right": "right", "loss": "loss", "wrong": "misreads", "fails": "refuses"}


def verdicts(source: Path, *more: str | Path) -> dict[str, dict[str, Any]]:
    """By engine, as the report has them."""
    report = inspected(source, "--engines", *more)
    assert report["verdicts"] == report["components"]["."]["verdicts"]
    assert [one["engine"] for one in report["verdicts"]] == ALL
    return {one["engine"]: one for one in report["verdicts"]}


def looked_at(folder: Path, base: Path | None) -> dict[str, EngineVerdict]:
    with CheckpointReader(folder) as reader:
        against = CheckpointReader(base) if base is not None else None
        component = inspect_component(reader, against, every_scale=False, max_error=0.2)
        return {one.engine: one for one in engine_verdicts(reader, component.modules)}


@pytest.mark.parametrize(("family", "form"), [(family, form) for family in FAMILIES for form in ("nvfp4", "fp8")])
def test_the_verdict_is_what_the_loader_was_seen_to_do(families: Path, tmp_path: Path, family: str, form: str) -> None:
    """With the base the layout is proven, so that a verdict is one; without it, what is right is assumed."""
    folder = build(families, family, form, tmp_path)
    proven, alone = looked_at(folder, families / family / "base" / "transformer"), looked_at(folder, None)
    for engine in ENGINES:
        row, found = recorded()[engine, family, form], proven[engine]
        assert found.version == row["version"]
        assert found.verdict == OUTCOMES[row["outcome"]], (engine, found)
        unsure = found.verdict == "right" and form == "nvfp4"
        assert alone[engine].verdict == ("assumes" if unsure else found.verdict)
        assert found.how and found.source
        assert found.shown == "run" or found.verdict == "right"
    for engine, figure in (("sglang", proven["sglang"].figure), ("vllm-omni", proven["vllm-omni"].figure)):
        # Where globals of fused parts differ, the loss that is computed from the scales is that of the engine's loader.
        if figure is not None and proven[engine].verdict == "loss":
            assert figure == pytest.approx(recorded()[engine, family, form]["figure"], rel=0.35)
            assert f"{figure:.1%}" in proven[engine].how


def test_swapped_nibbles_are_right_for_the_engine_that_knows_the_key(
    built_nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    assert run_mopt("swap-nibbles", built_nvfp4, tmp_path / "out").exit_code == 0
    assert verdicts(tmp_path / "out", "--base", base)["sglang"]["verdict"] == "right"
    # A key that lies: the base tells. Without it nobody knows, and what is assumed stands beside what is declared.
    edit_json(
        tmp_path / "out" / "config.json", lambda one: one["quantization_config"].update(swap_weight_nibbles=False)
    )
    lied = verdicts(tmp_path / "out", "--base", base)["sglang"]
    assert lied["verdict"] == "misreads" and lied["assumes"]["nibble_order"] == "low"
    assert len(lied["modules"]["even columns read from the other nibble"]) == 24
    alone = verdicts(tmp_path / "out")["sglang"]
    assert alone["verdict"] == "assumes" and alone["how"].startswith("assumes low nibble first")


def test_swapped_nibbles_are_misread_by_the_engine_that_does_not(families: Path, tmp_path: Path) -> None:
    folder, base = build(families, "qwen_image", "nvfp4", tmp_path), families / "qwen_image" / "base"
    assert run_mopt("swap-nibbles", folder, tmp_path / "out").exit_code == 0
    found = verdicts(tmp_path / "out", "--base", base)
    assert found["sglang"]["verdict"] == "right" and found["vllm-omni"]["verdict"] == "misreads"
    alone = verdicts(tmp_path / "out")["vllm-omni"]
    assert alone["verdict"] == "assumes" and alone["how"].endswith("misread if that is true")


@pytest.fixture(scope="module")
def qwen(families: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen-Image, whose names are ComfyUI's too: ComfyUI's files of both formats, made by its rules."""
    root = tmp_path_factory.mktemp("qwen")
    found: dict[str, Path] = {}
    for form, word in (("nvfp4", "nvfp4"), ("fp8", "float8_e4m3fn")):
        tensors = load(build(families, "qwen_image", form, root))
        marked = comfy(tensors, word)
        found[form] = root / f"{form}.safetensors"
        save_file(marked, found[form])
        found[f"raw-{form}"] = root / f"raw-{form}.safetensors"
        save_file(tensors, found[f"raw-{form}"])
    wrong = load_file(found["nvfp4"])
    for name in [name for name in wrong if name.endswith(".weight_scale_2")]:
        weight = name.replace(".weight_scale_2", ".weight")
        wrong[weight] = swap(wrong[weight])
    found["swapped"] = root / "swapped.safetensors"
    save_file(wrong, found["swapped"])
    return found


def comfy(tensors: Tensors, word: str) -> Tensors:
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    made = dict(tensors)
    for module in modules:
        if word == "nvfp4":
            made[f"{module}.weight"] = swap(tensors[f"{module}.weight"])
            made[f"{module}.weight_scale"] = swizzle(tensors[f"{module}.weight_scale"])
        made[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps({"format": word}).encode()), dtype=torch.uint8)
    return made


def test_comfyui_reads_its_own_files_and_the_base_tells_swapped_ones(qwen: dict[str, Path], families: Path) -> None:
    base = families / "qwen_image" / "base"
    for name, expected in (("nvfp4", "right"), ("fp8", "right"), ("swapped", "misreads")):
        found = verdicts(qwen[name], "--base", base)["comfyui"]
        assert found["verdict"] == expected, found
        assert found["depends"] == "" and found["notes"] == []
    assert found["modules"].keys() == {"even columns read from the other nibble"}
    alone = verdicts(qwen["swapped"])["comfyui"]
    assert alone["verdict"] == "assumes"  # nothing in the file tells
    raw = {form: verdicts(qwen[f"raw-{form}"])["comfyui"]["verdict"] for form in ("nvfp4", "fp8")}
    assert raw == {"nvfp4": "refuses", "fp8": "misreads"}


def test_a_table_of_80_columns_says_it(qwen: dict[str, Path], built_nvfp4: Path) -> None:
    text = run_mopt("inspect", built_nvfp4, "--engines", json_report=False).stdout
    assert "\nengine " in text and "verdict  how\n" in text
    for engine, pins in ENGINES.items():
        assert f"\n{engine} {pins['version']} " in text
    assert "believes:" not in text
    assert "believes:" in run_mopt("inspect", built_nvfp4, json_report=False).stdout
    rows = [[f"{one['engine']} {one['version']}", one["verdict"], one["how"]] for one in verdicts(built_nvfp4).values()]
    assert max(map(len, table_lines(["engine", "verdict", "how"], rows, 80))) <= 80
    single = run_mopt("inspect", qwen["fp8"], "--engines", json_report=False).stdout
    assert "  diffusers: only if the caller passes BFLQuantizationConfig()" in single


def test_every_dialect_has_a_verdict_of_every_engine(tmp_path: Path) -> None:
    for dialect, maker in MAKERS:
        report = inspected(maker(tmp_path / maker.__name__), "--engines")
        found = [one["engine"] for one in report["verdicts"]]
        assert found == ([] if dialect == "unquantized" else ALL), maker
        for one in report["verdicts"]:
            assert one["how"] and one["source"] and one["shown"] in ("run", "read", "inferred")
    assert len(FILES) >= 20 and inspected(unquantized(tmp_path / "plain"))["verdicts"] == []


def test_a_layout_that_is_declared_otherwise_is_said(tmp_path: Path) -> None:
    """Black Forest Labs' files through diffusers' reader of another layout with the same names."""
    found = verdicts(bfl(tmp_path / "bfl"))
    assert found["sglang"]["how"].startswith("assumes high nibble first, scales 128x4; declared high nibble first")
    assert found["diffusers"]["verdict"] == "assumes" and found["diffusers"]["how"].endswith("misread if that is true")
    padded = verdicts(comfyui(tmp_path / "comfyui"))
    assert padded["sglang"]["verdict"] == "refuses" and "scales padded" in padded["sglang"]["how"]


def test_what_is_not_in_one_file_is_said(tmp_path: Path) -> None:
    folder = modelopt(tmp_path / "modelopt")
    tensors = load_file(next(folder.glob("*.safetensors")))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        save_file(
            {name: tensors[name] for name in part},
            folder / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors",
            {"format": "pt"},
        )
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
        "weight_map": {
            name: f"diffusion_pytorch_model-0000{1 + (place >= len(names) // 2)}-of-00002.safetensors"
            for place, name in enumerate(names)
        },
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "it takes one file" in verdicts(folder)["comfyui"]["notes"][-1]


def test_globals_that_differ_are_told_of_this_file_alone(families: Path, tmp_path: Path) -> None:
    """The fact about HunyuanVideo in SGLang holds where the globals differ, and this file's do not any more."""
    folder = build(families, "hunyuan_video", "nvfp4", tmp_path)
    found = verdicts(folder)["sglang"]
    assert found["verdict"] == "loss" and found["figure"] > 0.01
    assert found["modules"].keys() == {"block scales rounded again"}

    def one_global(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".weight_scale_2"):
                tensors[name] = torch.tensor(0.001)

    equal = verdicts(edit(folder, tmp_path / "equal", one_global))["sglang"]
    assert equal["verdict"] == "assumes" and equal["figure"] is None and equal["modules"] == {}


def test_marker_tensors_that_are_no_json_do_no_harm(tmp_path: Path) -> None:
    source = unlabelled_fp8(tmp_path / "fp8")
    tensors = load_file(source)
    tensors["blocks.0.attn.to_q.comfy_quant"] = torch.tensor([123, 255, 0], dtype=torch.uint8)
    path = write_file(tmp_path / "marked", tensors)
    found = verdicts(path)["comfyui"]
    assert found["verdict"] == "refuses" and "Unknown quantization format" in found["how"]


def test_shapes_that_no_engine_has_do_no_harm(tmp_path: Path) -> None:
    """A header may name any module, and a weight may have any shape."""
    layers = json.dumps({"layers": {"a": {"format": "nvfp4"}, "b": {"format": "nvfp4"}, "c": 1}})
    tensors = {
        "a.weight": torch.zeros(8, dtype=torch.uint8),
        "a.weight_scale": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "b.weight": torch.zeros(8, 8, dtype=torch.uint8),
        "b.weight_scale": torch.tensor(1.0),
        "b.weight_scale_2": torch.ones(2),
    }
    found = verdicts(write_file(tmp_path / "odd", tensors, {"_quantization_metadata": layers}))
    assert all(one["verdict"] != "right" for one in found.values())
