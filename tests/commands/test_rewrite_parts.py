"""Rewrites of checkpoints that are not one whole transformer: with modules in parts, or more than the transformer."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import Tensors, edit, load, packed_in, run_mopt, same_bits


@pytest.mark.parametrize("fault", ["missing", "BF16"])
@pytest.mark.parametrize("command", ["swap-nibbles", "unswizzle-scales"])
@given(seed=st.integers(0, 1000), count=st.integers(1, 4), with_base=st.booleans())
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_packed_weight_without_block_scales_is_not_left_as_it_is_among_others(
    command: str,
    fault: str,
    seed: int,
    count: int,
    with_base: bool,
    nvfp4: Path,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    names = packed_in(load(nvfp4 / "transformer"))
    broken = [
        names[int(at)] for at in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count]
    ]

    def damage(tensors: Tensors) -> None:
        for name in broken:
            scale = tensors.pop(f"{name}.weight_scale")
            if fault == "BF16":
                tensors[f"{name}.weight_scale"] = scale.float().bfloat16()

    source = edit(nvfp4, folder / "source", damage)
    more = ["--base", base] if with_base else []
    refused = run_mopt(command, source, folder / "out", *more)
    assert refused.exit_code == 3 and refused.report is not None, refused.stderr
    assert {name for one in refused.report["error"]["faults"] for name in one["names"]} >= set(broken)
    assert not (folder / "out").exists()


def test_a_text_encoder_in_the_file_is_left_out_and_said(families: Path, tmp_path: Path) -> None:
    """Its NVFP4 is in an order of its own, and its FP8 is no fault of the transformer."""
    made = run_mopt("convert", families / "wan" / "nvfp4", tmp_path / "comfyui", "--to", "comfyui")
    assert made.exit_code == 0, made.stderr
    inner = load(tmp_path / "comfyui")
    packed = next(name for name, one in inner.items() if name.endswith(".weight") and one.dtype == torch.uint8)
    beside = {
        "text_encoders.t5xxl.a.weight": inner[packed].clone(),
        "text_encoders.t5xxl.a.weight_scale": inner[packed.replace(".weight", ".weight_scale")].clone(),
        "text_encoders.t5xxl.a.weight_scale_2": torch.tensor(0.5),
        "text_encoders.t5xxl.b.weight": torch.ones(16, 16).to(torch.float8_e4m3fn),
        "first_stage_model.x.weight": torch.ones(4, 4),
    }
    (tmp_path / "it").mkdir()
    file = tmp_path / "it" / "whole.safetensors"
    save_file({f"model.diffusion_model.{name}": one for name, one in inner.items()} | beside, file)
    done = run_mopt("swap-nibbles", file, tmp_path / "out", "--force-names")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    fates = done.report["ledger"]["source"]
    assert {name for name, fate in fates.items() if fate.startswith("left out: ")} == beside.keys()
    assert "input.left_out" in {one["code"] for one in done.report["warnings"]}
    out = load(tmp_path / "out")
    assert not beside.keys() & out.keys()
    assert not same_bits(out[f"model.diffusion_model.{packed}"], inner[packed])
    # With a base the second order is proven, too.
    base = families / "wan" / "base"
    proven = run_mopt("unswizzle-scales", tmp_path / "out", tmp_path / "both", "--force-names", "--base", base)
    assert proven.exit_code == 0, proven.stderr
    whole = {**load(tmp_path / "out"), **beside}
    (tmp_path / "again").mkdir()
    save_file(whole, tmp_path / "again" / "whole.safetensors")
    again = run_mopt("unswizzle-scales", tmp_path / "again" / "whole.safetensors", tmp_path / "more", "--force-names",
                     "--base", base)  # fmt: skip
    assert again.exit_code == 0 and again.report is not None, again.stderr
    assert again.report["proof"]["words"] == "proven"
