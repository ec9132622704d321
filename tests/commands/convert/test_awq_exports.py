"""AWQ and SVDQuant exports converted: to BF16, to ComfyUI with their factors, to plain NVFP4."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import edit, load, run_mopt

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.awq import folded
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.source import describe

ONE = "transformer_blocks.0.ff.net.0.proj"


def meant(folder: Path) -> dict[str, torch.Tensor]:
    """What every matrix multiplies by, under diffusers' names."""
    with CheckpointReader(folder, need_config=False) as reader:
        described: Canonical = describe(reader, None, {}).described
        found = {}
        for name in {one.rpartition(".")[0] for one in described.tensors if one.endswith(".weight")}:
            roles = described.of(name)
            if len(roles["weight"].shape) == 2:
                info = folded(roles, described.modules.get(name), "F32")
                raw = bytearray(reader.read_of(info, 0, info.num_bytes))
                found[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(info.shape)
        return found


def converted(source: Path, output: Path, *more: str | Path) -> dict[str, Any]:
    outcome = run_mopt("convert", source, output, *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    found: dict[str, Any] = outcome.report["convert"]
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("variant", ["nvfp4_awq", "nvfp4_svd"])
def test_bf16_holds_what_is_multiplied_by(transformed_exports: Path, tmp_path: Path, variant: str) -> None:
    source = transformed_exports / variant
    report = converted(source, tmp_path / "out", "--to", "bf16")
    before, after = meant(source / "transformer"), load(tmp_path / "out")
    assert len(before) == 50 == sum(one.ndim == 2 for one in after.values())
    for name, tensor in before.items():
        assert torch.equal(tensor.bfloat16(), after[f"{name}.weight"]), name
    assert report["modules"]["bf16"] == 40 and not report["proven"]
    assert all(0 < one["rel_error"] < 0.004 for one in report["lossy"])


def test_plain_modules_are_the_bases_where_it_is_given(transformed_exports: Path, tmp_path: Path) -> None:
    base = transformed_exports / "base"
    report = converted(transformed_exports / "nvfp4_svd", tmp_path / "out", "--to", "bf16", "--base", base)
    wanted, found = load(base / "transformer"), load(tmp_path / "out")
    for name in ("x_embedder", "proj_out", "context_embedder"):
        assert torch.equal(wanted[f"{name}.weight"], found[f"{name}.weight"])
    assert "near the base" in report["words"] and not report["proven"]


def test_comfyui_keeps_the_factors_but_of_what_it_fuses(transformed_exports: Path, tmp_path: Path) -> None:
    source = transformed_exports / "nvfp4_awq"
    run = run_mopt("convert", source, tmp_path / "out", "--to", "comfyui")
    assert run.exit_code == 3 and "convert.inexact" in run.stderr and not (tmp_path / "out").exists()
    run = run_mopt("convert", source, tmp_path / "out", "--to", "comfyui", "--inexact", "bf16")
    assert run.exit_code == 0 and run.report is not None
    [warning] = [one for one in run.report["warnings"] if one["code"] == "convert.factors"]
    assert "24 modules" in warning["message"] and "from 0.30.0 on" in warning["message"]
    report = run.report["convert"]
    assert report["modules"]["exact"] == 32 and report["modules"]["bf16"] == 8
    seen = run_mopt("inspect", tmp_path / "out", "--engines")
    assert seen.report is not None and "pre_quant_scale from 0.30.0 on" in seen.stdout
    before, after = meant(source / "transformer"), meant(tmp_path / "out")
    kept = load(tmp_path / "out")
    assert sum(name.endswith(".pre_quant_scale") for name in kept) == 24
    lossy = {one for each in report["lossy"] for one in each["members"]}
    for name, tensor in before.items():
        packed = f"{name}.weight_scale" in load(source / "transformer")
        if packed and name not in lossy:
            assert torch.equal(tensor, after[name]), name
        else:
            assert torch.equal(tensor.bfloat16().float(), after[name]), name


@pytest.mark.parametrize("target", ["modelopt", "comfyui"])
@pytest.mark.parametrize("with_base", [False, True])
def test_plain_nvfp4_of_what_is_multiplied_by(
    transformed_exports: Path, tmp_path: Path, target: str, with_base: bool
) -> None:
    source, base = transformed_exports / "nvfp4_svd", transformed_exports / "base"
    more: list[str | Path] = ["--base", base] if with_base else []
    report = converted(source, tmp_path / "out", "--to", target, "--inexact", "requantize", *more)
    assert report["modules"]["requantized"] == 40 and not report["proven"]
    before, after = meant(source / "transformer"), meant(tmp_path / "out")
    weights = load(base / "transformer")
    for one in report["lossy"]:
        (name,) = one["members"]
        assert one["rel_error"] == pytest.approx(apart(after[name], before[name]), rel=1e-4)
        near = weights[f"{name}.weight"].float() if with_base else before[name]
        assert apart(after[name], near) < 0.12, name
        assert ("the base" in one["why"]) == with_base
    assert not any(name.endswith((".input_scale", ".pre_quant_scale")) for name in load(tmp_path / "out"))


def test_a_base_that_is_another_is_refused(transformed_exports: Path, tmp_path: Path) -> None:
    """One matrix of forty is another: the guard goes by module."""
    base = edit(
        transformed_exports / "base",
        tmp_path / "base",
        lambda tensors: tensors.update({f"{ONE}.weight": tensors[f"{ONE}.weight"].roll(1, 0)}),
    )
    run = run_mopt("convert", transformed_exports / "nvfp4_awq", tmp_path / "out", "--to", "bf16", "--base", base)
    assert run.exit_code == 1 and "check.proof" in run.stderr and ONE in run.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_all_zero_has_no_scale(transformed_exports: Path, tmp_path: Path) -> None:
    source = edit(
        transformed_exports / "nvfp4_awq",
        tmp_path / "source",
        lambda tensors: tensors[f"{ONE}.pre_quant_scale"].zero_(),
    )
    run = run_mopt("convert", source, tmp_path / "out", "--to", "modelopt", "--inexact", "requantize")
    assert run.exit_code == 3 and "convert.no_scale" in run.stderr


def test_other_targets_refuse_in_one_line(transformed_exports: Path, tmp_path: Path) -> None:
    run = run_mopt("convert", transformed_exports / "nvfp4_awq", tmp_path / "out", "--to", "torchao")
    assert run.exit_code == 3 and "convert.inexact" in run.stderr and "--to comfyui" in run.stderr
