"""Real exports, whole, in every spelling of a ComfyUI file: each is converted into the export's bytes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import run_mopt

Tensors = dict[str, torch.Tensor]
Spelled = tuple[Tensors, Mapping[str, str]]
PREFIX = "model.diffusion_model."
KEY = "_quantization_metadata"


def without_markers(tensors: Tensors) -> Tensors:
    return {name: one for name, one in tensors.items() if not name.endswith(".comfy_quant")}


def header_only(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    return without_markers(tensors), said


def markers_only(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    return tensors, {}


def prefixed(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    named = json.loads(said[KEY])
    named["layers"] = {PREFIX + name: layer for name, layer in named["layers"].items()}
    return {PREFIX + name: one for name, one in tensors.items()}, {KEY: json.dumps(named)}


def legacy(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    found: Tensors = {f"{PREFIX}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, one in without_markers(tensors).items():
        spelled = name.replace(".weight_scale", ".scale_weight").replace(".input_scale", ".scale_input")
        found[PREFIX + spelled] = one
    return found, {}


def of_one_element(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    return {name: one.reshape(1) if name.endswith("_scale") else one for name, one in tensors.items()}, said


def a_scale_a_row(tensors: Tensors, said: Mapping[str, str]) -> Spelled:
    return {
        name: one.repeat(len(tensors[name.removesuffix("_scale")]), 1) if name.endswith(".weight_scale") else one
        for name, one in tensors.items()
    }, said


@pytest.fixture(scope="module")
def comfyui(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Spelled]:
    root = tmp_path_factory.mktemp("comfyui")

    def made(kind: str) -> Spelled:
        output = root / kind
        if not output.is_dir():
            outcome = run_mopt("convert", families / "wan" / kind, output, "--to", "comfyui")
            assert outcome.exit_code == 0, outcome.message
        (file,) = output.glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            said = {key: text for key, text in opened.metadata().items() if key == KEY}
        return load_file(file), said

    return made


CASES = [(kind, spell) for kind in ("nvfp4", "fp8") for spell in (header_only, markers_only, prefixed)]
CASES += [("fp8", legacy), ("fp8", of_one_element), ("fp8", a_scale_a_row)]


@pytest.mark.parametrize(("kind", "spell"), CASES, ids=lambda item: getattr(item, "__name__", item))
def test_every_spelling_becomes_the_export_again(
    kind: str,
    spell: Callable[[Tensors, Mapping[str, str]], Spelled],
    comfyui: Callable[[str], Spelled],
    families: Path,
    tmp_path: Path,
) -> None:
    tensors, said = spell(*comfyui(kind))
    (tmp_path / "in").mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "in/in.safetensors", dict(said))
    export = families / "wan" / kind / "transformer"
    config = json.loads((export / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    outcome = run_mopt("convert", tmp_path / "in/in.safetensors", tmp_path / "out", "--to", "bf16")
    assert outcome.exit_code == 0, outcome.message
    wanted = tmp_path / "wanted"
    assert run_mopt("convert", export, wanted, "--to", "bf16").exit_code == 0
    _same(tmp_path / "out", wanted)
    if spell is not a_scale_a_row:
        outcome = run_mopt("convert", tmp_path / "in/in.safetensors", tmp_path / "back", "--to", "modelopt")
        assert outcome.exit_code == 0, outcome.message
        _same(tmp_path / "back", export)


def _same(folder: Path, other: Path) -> None:
    left, right = (
        {name: one for file in root.glob("*.safetensors") for name, one in load_file(file).items()}
        for root in (folder, other)
    )
    assert left.keys() == right.keys() and left
    for name, one in left.items():
        assert (one.dtype, one.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(one.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name
