"""build-nvfp4 on real exports of every family, and the parts of the preset language that FLUX.1 does not need."""

from pathlib import Path

import pytest
import torch
from support import build, config_of, load, same_bits

FAMILIES = ("flux1", "flux2", "wan", "qwen_image", "hunyuan_video", "ltx2")

WAN = """
schema = 1
name = "wan-test"
title = "Wan"
class_name = "WanTransformer3DModel"
base_repo = "org/wan"
repos = ["org/wan"]
pipeline_tag = "text-to-video"
load_flag = "--transformer-path"
fused = [["to_q", "to_k", "to_v"]]
keep_fp32 = KEEP
[config]
[runtime_names]
[nvfp4]
status = "candidate"
source = "a test"
min_gpu = "SM100"
known_limits = []
structural = ["patch_embedding", "condition_embedder.**", "proj_out"]
quality = ["blocks.[:3].**", "blocks.[-2:].**"]
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_reproduced(families: Path, tmp_path: Path, family: str) -> None:
    export, base = families / family / "nvfp4", families / family / "base"
    outcome = build(export, base, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, source = load(tmp_path / "out"), load(export / "transformer")
    packed = {name.removesuffix(".weight") for name, tensor in out.items() if tensor.dtype == torch.uint8}
    assert outcome.report["proof"]["counts"] == {"reproduced": len(packed)} and packed
    for name, tensor in out.items():
        if name.rpartition(".")[0] in packed:
            assert same_bits(tensor, source[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name


def wan_preset(path: Path, keep: str) -> Path:
    # tomllib has no null: a model that ModelOpt's example does not name leaves modelopt_model out.
    path.write_text(WAN.replace("KEEP", keep))
    return path


def test_f32_stays_where_the_preset_says_so_and_nowhere_else(families: Path, tmp_path: Path) -> None:
    """Wan's base is F32 on disk; diffusers keeps tables and norms in F32."""
    keep = '["**.scale_shift_table", "blocks.*.norm2.*"]'
    preset = wan_preset(tmp_path / "wan.toml", keep)
    base = families / "wan" / "base"
    outcome = build(families / "wan" / "nvfp4", base, tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, source = load(tmp_path / "out"), load(base / "transformer")
    wide = {name for name, tensor in out.items() if tensor.dtype == torch.float32 and tensor.ndim}
    assert wide == {name for name in out if name.endswith("scale_shift_table") or ".norm2." in name}
    assert all(same_bits(out[name], source[name]) for name in wide)
    kept = {name for name, fate in outcome.report["ledger"]["export"].items() if fate == "kept"}
    narrow = {name for name, tensor in out.items() if tensor.dtype == torch.bfloat16} - kept
    assert all(same_bits(out[name], source[name].bfloat16()) for name in narrow)
    assert outcome.report["counts"]["base"]["used: cast F32 to BF16"] == len(narrow)
    # Six blocks: the first three and the last two are kept, one of which ModelOpt had packed.
    packed = {name.split(".")[1] for name, tensor in out.items() if tensor.dtype == torch.uint8}
    assert packed == {"3"}
    assert "blocks.2.attn1.to_q" in config_of(tmp_path / "out")["quantization_config"]["ignore"]


def test_a_keep_fp32_pattern_that_matches_nothing_is_an_error(families: Path, tmp_path: Path) -> None:
    preset = wan_preset(tmp_path / "wan.toml", '["blocks.*.norm9.*"]')
    where = families / "wan"
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 3 and outcome.error_code == "preset.no_match" and "norm9" in outcome.message


def test_fused_scales_that_differ_are_reported_and_pass(families: Path, tmp_path: Path) -> None:
    """ModelOpt does not unify q, k and v of Wan's attn2 (k and v only); SGLang rebases them."""
    where = families / "wan"
    preset = wan_preset(tmp_path / "wan.toml", "[]")
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 0 and outcome.report is not None
    differ = outcome.report["proof"]["fused_scales_differ"]
    assert list(differ) == ["blocks.3.attn2.to_q, blocks.3.attn2.to_k, blocks.3.attn2.to_v"]
    assert "export.fused_scales" in {warning["code"] for warning in outcome.report["warnings"]}
