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
