"""Fused groups whose members differ: refused, or one of three ways, each against an oracle nobody here wrote."""

import shutil
from pathlib import Path
from typing import Any

import comfy_kitchen
import pytest
import torch
from support import Tensors, config_of, load, run_mopt, same_bits

LINEAR1 = "single_blocks.0.linear1"
MEMBERS = [f"single_transformer_blocks.0.{one}" for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]


def converted(source: Path, out: Path, *more: str | Path) -> tuple[dict[str, Any], Tensors]:
    outcome = run_mopt("convert", source, out, "--to", "comfyui", *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return outcome.report["convert"], load(out)


def in_comfyui(tensors: Tensors, module: str) -> torch.Tensor:
    """As comfy-kitchen decodes a module."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if weight.dtype != torch.uint8:
        return comfy_kitchen.dequantize_per_tensor_fp8(weight, scale, torch.float32)
    return comfy_kitchen.dequantize_nvfp4(weight, tensors[f"{module}.weight_scale_2"], scale, torch.float32)


def in_modelopt(tensors: Tensors, module: str) -> torch.Tensor:
    """As ModelOpt decodes a module."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if weight.dtype != torch.uint8:
        return weight.to(torch.float32) * scale
    shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
    one = NVFP4QTensor(shape, torch.float32, weight)
    return one.dequantize(
        torch.float32, scale=scale, double_scale=tensors[f"{module}.weight_scale_2"], block_sizes={-1: 16}
    )


def told_error(told: dict[str, Any]) -> float:
    return float(next(one["rel_error"] for one in told["lossy"] if one["module"] == LINEAR1))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.to(torch.float64)
    return float((found.to(torch.float64) - wanted).norm() / wanted.norm())


@pytest.fixture
def original(exports: Path) -> torch.Tensor:
    tensors = load(exports / "nvfp4" / "transformer")
    return torch.cat([in_modelopt(tensors, name) for name in MEMBERS])


def test_nothing_inexact_is_written_unasked(exports: Path, tmp_path: Path) -> None:
    refused = run_mopt("convert", exports / "nvfp4", tmp_path / "out", "--to", "comfyui")
    assert refused.exit_code == 3 and "[convert.inexact]" in refused.stderr and LINEAR1 in refused.stderr
    assert not (tmp_path / "out").exists()


def test_bf16_has_the_values_of_the_source(exports: Path, tmp_path: Path, original: torch.Tensor) -> None:
    told, found = converted(exports / "nvfp4", tmp_path / "out", "--inexact", "bf16")
    assert torch.equal(found[f"{LINEAR1}.weight"], original.to(torch.bfloat16))
    assert not any(name.startswith(LINEAR1) and "scale" in name for name in found)
    assert told_error(told) == pytest.approx(relative(found[f"{LINEAR1}.weight"], original), rel=1e-9)
    planned = run_mopt("convert", exports / "nvfp4", tmp_path / "dry", "--to", "comfyui", "--inexact", "bf16", "-n")
    assert planned.report is not None
    (first, *_) = planned.report["convert"]["lossy"]
    assert first["at_most"] and first["rel_error"] == 2**-8 > told_error(told)
    assert not (tmp_path / "dry").exists() and not told["restorable"]


def test_bf16_with_a_base_has_the_values_of_the_base(exports: Path, base: Path, tmp_path: Path) -> None:
    _, found = converted(exports / "nvfp4", tmp_path / "out", "--inexact", "bf16", "--base", base)
    plain = load(base / "transformer")
    assert torch.equal(found[f"{LINEAR1}.weight"], torch.cat([plain[f"{name}.weight"] for name in MEMBERS]))


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_rebased_scales_are_the_largest_and_the_error_is_told(exports: Path, tmp_path: Path, algorithm: str) -> None:
    told, found = converted(exports / algorithm, tmp_path / "out", "--inexact", "rebase")
    tensors = load(exports / algorithm / "transformer")
    role = "weight_scale_2" if algorithm == "nvfp4" else "weight_scale"
    assert found[f"{LINEAR1}.{role}"] == max(tensors[f"{name}.{role}"] for name in MEMBERS)
    inputs = torch.stack([tensors[f"{name}.input_scale"].reshape(()) for name in MEMBERS])
    assert found[f"{LINEAR1}.input_scale"] == inputs.max()
    error = relative(in_comfyui(found, LINEAR1), torch.cat([in_modelopt(tensors, name) for name in MEMBERS]))
    assert 0 < error < 2**-4 and told_error(told) == pytest.approx(error, rel=1e-6)


def test_requantized_is_what_modelopt_makes_of_the_base(exports: Path, base: Path, tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    told, found = converted(exports / "nvfp4", tmp_path / "out", "--inexact", "requantize", "--base", base)
    plain = load(base / "transformer")
    weight = torch.cat([plain[f"{name}.weight"] for name in MEMBERS])
    fresh, scale, double = NVFP4QTensor.quantize(weight.clone(), 16)
    assert found[f"{LINEAR1}.weight_scale_2"] == double
    wanted = fresh.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    assert torch.equal(in_comfyui(found, LINEAR1), wanted)
    assert told["proven"] and told["modules"]["requantized"] == 8


def test_requantize_needs_a_base(exports: Path, tmp_path: Path) -> None:
    refused = run_mopt("convert", exports / "nvfp4", tmp_path / "out", "--to", "comfyui", "--inexact", "requantize")
    assert refused.exit_code == 3 and "[convert.inexact]" in refused.stderr and "--base" in refused.stderr


def test_the_way_back_needs_no_config(exports: Path, tmp_path: Path) -> None:
    """What is in BF16 stays so; all else is the export's, and the record has the config."""
    source = exports / "nvfp4"
    assert run_mopt("convert", source, tmp_path / "there", "--to", "comfyui", "--inexact", "bf16").exit_code == 0
    back = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert back.exit_code == 0 and back.report is not None, back.stderr
    assert "convert.config_claimed" in {one["code"] for one in back.report["warnings"]}
    # State of quantizers, which no engine reads, is not given back where anything is missing.
    before = {name: one for name, one in load(source / "transformer").items() if "_quantizer." not in name}
    after = load(tmp_path / "back")
    same = {name for name in after if name in before and same_bits(after[name], before[name])}
    changed = {name.rpartition(".")[0] for name in before.keys() | after.keys() if name not in same}
    packed = {name.removesuffix("_scale_2") for name in before if name.endswith(".weight_scale_2")}
    assert len(same) > 150 and changed and all(after[f"{name}.weight"].dtype == torch.bfloat16 for name in changed)
    assert {f"{name}.weight" for name in changed} < packed
    made, own = config_of(tmp_path / "back"), config_of(source / "transformer")
    left = ("quantization_config", "_name_or_path")
    assert {key: made[key] for key in made if key not in left} == {key: own[key] for key in own if key not in left}
    assert set(made["quantization_config"]["ignore"]) >= changed


def test_a_config_of_other_bytes_is_not_taken(exports: Path, tmp_path: Path) -> None:
    assert (
        run_mopt("convert", exports / "nvfp4", tmp_path / "there", "--to", "comfyui", "--inexact", "bf16").exit_code
        == 0
    )
    (file,) = (tmp_path / "there").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    back = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt")
    assert back.exit_code == 3 and back.error_code == "convert.config", back.stderr


def test_the_config_of_one_file_is_kept(exports: Path, tmp_path: Path) -> None:
    """A file has no config.json of its own: what stood in for it comes back."""
    source = exports / "nvfp4" / "transformer"
    (weights,) = source.glob("*.safetensors")
    shutil.copy(weights, tmp_path / "one.safetensors")
    given = ("--config", source, "--to", "torchao")
    assert run_mopt("convert", tmp_path / "one.safetensors", tmp_path / "there", *given).exit_code == 0
    (tmp_path / "there" / "config.json").unlink()
    back = run_mopt("convert", tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--from", "torchao")
    assert back.exit_code == 0, back.stderr
    assert load(tmp_path / "back").keys() == load(source).keys() and config_of(tmp_path / "back") == config_of(source)
