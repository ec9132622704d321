"""What a conversion tells of a source that is incomplete, or whose scales no engine can compute with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import load, run_mopt

MODULE = "single_transformer_blocks.0.attn.to_out"
NORM = "transformer_blocks.0.attn.norm_q.weight"


def changed(families: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    source = families / "flux2" / "nvfp4" / "transformer"
    tensors = {name: one.clone() for name, one in load(source).items()}
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


@pytest.mark.parametrize("to", ["comfyui", "torchao", "compressed-tensors"])
def test_a_block_scale_that_is_nan_is_told(families: Path, tmp_path: Path, to: str) -> None:
    done = run_mopt("convert", changed(families, tmp_path / "in", nan), tmp_path / "out", "--to", to)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    told = {one["code"]: one["message"] for one in done.report["warnings"]}
    assert MODULE in told["scale.nan"]


@pytest.mark.parametrize("value", [0.0, -1e-3])
@pytest.mark.parametrize("to", ["comfyui", "torchao", "bf16"])
def test_a_global_scale_that_is_not_positive_is_told(families: Path, tmp_path: Path, to: str, value: float) -> None:
    source = changed(families, tmp_path / "in", lambda found: found[f"{MODULE}.weight_scale_2"].fill_(value))
    for more in ((), ("--dry-run",)):
        done = run_mopt("convert", source, tmp_path / "out", "--to", to, *more, "--overwrite")
        assert done.exit_code == 0 and done.report is not None, done.stderr
        told = {one["code"]: one["message"] for one in done.report["warnings"]}
        assert f"{MODULE}.weight_scale_2" in told["scale.unusable"]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_with_a_base_every_tensor_of_both_has_to_be_there(
    families: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    base = families / "flux2" / "base"
    source = changed(families, tmp_path / "less", lambda found: found.pop(NORM))
    done = run_mopt("convert", source, tmp_path / "out", "--to", "torchao", "--base", base, *more)
    assert done.exit_code == 3 and "[export.missing_tensor]" in done.stderr and NORM in done.stderr
    source = changed(families, tmp_path / "more", lambda found: found.update({"extra.weight": torch.ones(4)}))
    done = run_mopt("convert", source, tmp_path / "out", "--to", "torchao", "--base", base, *more)
    assert done.exit_code == 3 and "[base.missing_tensor]" in done.stderr and "extra.weight" in done.stderr


def test_a_model_that_lacks_a_part_is_not_called_unknown_for_its_class(families: Path, tmp_path: Path) -> None:
    def cut(found: dict[str, torch.Tensor]) -> None:
        for name in [one for one in found if one.startswith("transformer_blocks.0.attn.to_q.")]:
            del found[name]

    done = run_mopt("convert", changed(families, tmp_path / "in", cut), tmp_path / "out", "--to", "comfyui")
    assert done.exit_code == 3 and "no key map" not in done.stderr and "whole" in done.stderr, done.stderr


def test_fp8_scales_for_each_row_are_told_where_comfyui_shall_read_them(families: Path, tmp_path: Path) -> None:
    """A file of others: ComfyUI loads it, and cannot multiply by it."""
    assert run_mopt("convert", families / "qwen_image" / "fp8", tmp_path / "one", "--to", "comfyui").exit_code == 0
    tensors = load(tmp_path / "one")
    scales = [name for name in tensors if name.endswith(".weight_scale")]
    for name in scales:
        tensors[name] = tensors[name].expand(len(tensors[name.removesuffix("_scale")]), 1).contiguous()
    save_file(tensors, tmp_path / "rows.safetensors", {"format": "pt"})
    done = run_mopt("convert", tmp_path / "rows.safetensors", tmp_path / "out", "--to", "comfyui")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    told = {one["code"]: one["message"] for one in done.report["warnings"]}
    assert f"{len(scales)} FP8 weights have a scale for each row" in told["convert.row_scales"]
    seen = run_mopt("inspect", tmp_path / "out", "--engines")
    assert seen.report is not None
    [verdict] = [one for one in seen.report["verdicts"] if one["engine"] == "comfyui"]
    assert verdict["verdict"] == "refuses" and "scale for each row" in verdict["how"]


@pytest.mark.parametrize("gone", [f"{MODULE}.weight", "single_transformer_blocks.1."])
def test_without_a_base_a_missing_block_or_weight_is_told(families: Path, tmp_path: Path, gone: str) -> None:
    """The config's counts and the other blocks tell."""

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        module = gone.removesuffix(".weight")
        for name in [name for name in tensors if name.startswith(module)]:
            del tensors[name]

    done = run_mopt("convert", changed(families, tmp_path / "in", lose), tmp_path / "out", "--to", "torchao")
    assert done.exit_code == 3 and "[export.missing_tensor]" in done.stderr, done.stderr
    words = "no block 1 in 'single_transformer_blocks'" if gone.endswith(".") else f"no {gone!r}"
    assert words in done.message and not (tmp_path / "out").exists()
