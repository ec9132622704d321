"""build-nvfp4 on real exports of every family with its preset, and what of the preset language FLUX.1 does not need."""

from pathlib import Path

import pytest
import sglang_runtime
import torch
import vllm_runtime
from families import ALL, MORE, PRESETS, WITHOUT_PRESET, allowed
from fp8_support import convert
from support import Tensors, build, config_of, edit, load, run_mopt, same_bits

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import load_preset

SINGLE_BLOCKS = {"single_transformer_blocks.0", "single_transformer_blocks.1"}


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
quality = ["blocks.[:3].**", "blocks.[-4:].**"]
"""


@pytest.mark.parametrize("family", WITHOUT_PRESET)
def test_every_family_is_reproduced(families: Path, tmp_path: Path, family: str) -> None:
    export, base = families / family / "nvfp4", families / family / "base"
    outcome = build(export, base, tmp_path / "out", *allowed(family), preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, source = load(tmp_path / "out"), load(export / "transformer")
    packed = {name.removesuffix(".weight") for name, tensor in out.items() if tensor.dtype == torch.uint8}
    assert outcome.report["proof"]["counts"] == {"reproduced": len(packed)} and packed
    for name, tensor in out.items():
        if name.rpartition(".")[0] in packed:
            assert same_bits(tensor, source[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name


@pytest.mark.parametrize("family", ALL)
def test_every_family_with_its_preset(families: Path, tmp_path: Path, family: str) -> None:
    name, blocks = ALL[family]
    preset = load_preset(name).preset
    where = families / family
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", *allowed(family), preset=name)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert set(outcome.report["proof"]["counts"]) | {"reproduced (sampled rows)"} == {
        "reproduced",
        "reproduced (sampled rows)",
    }
    out, export, base = load(tmp_path / "out"), load(where / "nvfp4/transformer"), load(where / "base/transformer")

    packed = {module_of(name) for name, tensor in out.items() if tensor.dtype == torch.uint8}
    matcher = PatternMatcher(map(module_of, base))
    rules = preset.rules("nvfp4")
    kept = {module for pattern in [*rules.structural, *rules.quality] for module in matcher.find(pattern)}
    assert packed == {module_of(name) for name, tensor in export.items() if tensor.dtype == torch.uint8} - kept
    blocks = blocks | SINGLE_BLOCKS & {".".join(module.split(".")[:2]) for module in base}
    assert {".".join(module.split(".")[:2]) for module in packed} == blocks

    for tensor_name, tensor in out.items():
        if module_of(tensor_name) in packed:
            assert same_bits(tensor.reshape(export[tensor_name].shape), export[tensor_name]), tensor_name
        elif any(matcher.matches(pattern, tensor_name) for pattern in preset.keep_fp32):
            assert tensor.dtype == torch.float32 and same_bits(tensor, base[tensor_name]), tensor_name
        else:
            assert same_bits(tensor, base[tensor_name].bfloat16()), tensor_name
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    linears = {module_of(name) for name, tensor in base.items() if name.endswith(".weight") and tensor.ndim >= 2}
    for excluded in (sglang_runtime.is_excluded, vllm_runtime.is_excluded):
        assert {name for name in linears if excluded(name, ignore)} == linears - packed


@pytest.mark.parametrize("family", MORE)
def test_families_that_no_engine_loaded_are_proven_by_verify(families: Path, tmp_path: Path, family: str) -> None:
    where, base, (name, _) = families / family, families / family / "base", MORE[family]
    nvfp4, fp8 = tmp_path / "nvfp4", tmp_path / "fp8"
    assert build(where / "nvfp4", base, nvfp4, *allowed(family), preset=name).exit_code == 0
    assert convert(where / "fp8", base, fp8, *allowed(family, "fp8"), preset=name).exit_code == 0
    for out in (nvfp4, fp8):
        verified = run_mopt("verify", out, "--base", base)
        assert verified.exit_code == 0 and verified.report is not None, verified.stderr
        assert verified.report["verify"]["proof"] == "proven"


@pytest.mark.parametrize(
    ("repo", "title", "more"),
    [
        ("Tongyi-MAI/Z-Image", "Z-Image", {"license: apache-2.0", "pipeline_tag: text-to-image"}),
        ("Tongyi-MAI/Z-Image-Turbo", "Z-Image-Turbo", {"license: apache-2.0", "pipeline_tag: text-to-image"}),
        ("me/finetune", "finetune", set()),
    ],
)
def test_models_of_one_config_have_their_own_names(
    families: Path, tmp_path: Path, repo: str, title: str, more: set[str]
) -> None:
    where = families / "z_image"
    outcome = convert(
        where / "fp8", where / "base", tmp_path / "out", "--base-model", repo, *allowed("z_image", "fp8"), preset=None
    )
    assert outcome.exit_code == 0, outcome.stderr
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert {line for line in lines if line.startswith(("license", "pipeline_tag"))} == more
    assert f"base_model: {repo}" in lines and f"# {title}, FP8" in lines


@pytest.mark.parametrize("preset", ["flux2-dev", "none", None])
def test_what_an_engine_is_known_to_break_is_refused(families: Path, tmp_path: Path, preset: str | None) -> None:
    where = families / "flux2"
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=preset)
    assert outcome.exit_code == 3 and outcome.error_code == "engine.known_broken"
    assert "sglang@0.5.23" in outcome.message and "norm_out.linear" in outcome.message
    assert not (tmp_path / "out").exists()


# What SGLang looks up by other names than those on disk: one module each that is kept, and one that is packed.
SPELLINGS = {
    "wan": (
        ["blocks.0.to_q", "blocks.7.attn2.to_out", "blocks.2.ffn.fc_in", "blocks.2.ffn.net_0.proj"],
        ["blocks.3.to_q", "blocks.3.ffn.net_0.proj"],
    ),
    "qwen_image": (
        ["transformer_blocks.3.img_mod", "transformer_blocks.3.txt_mod"],
        ["transformer_blocks.3.attn.to_q"],
    ),
    "hunyuan_video": (
        ["double_blocks.0.img_mod.linear", "txt_in.refiner_blocks.0.self_attn_qkv"],
        ["single_blocks.0.linear1"],
    ),
    "ltx2": (
        ["patchify_proj", "adaln_single.linear", "transformer_blocks.0.ff.proj_in"],
        ["transformer_blocks.4.ff.proj_in"],
    ),
}


@pytest.mark.parametrize("family", SPELLINGS)
def test_ignore_has_the_names_of_the_runtime(families: Path, tmp_path: Path, family: str) -> None:
    where = families / family
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", *allowed(family), preset=PRESETS[family][0])
    assert outcome.exit_code == 0, outcome.stderr
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    kept, packed = SPELLINGS[family]
    for excluded in (sglang_runtime.is_excluded, vllm_runtime.is_excluded):
        assert [name for name in (*kept, *packed) if excluded(name, ignore)] == kept


def test_hunyuan_counts_its_single_blocks_on(families: Path, tmp_path: Path) -> None:
    """Two double blocks come first, so that the runtime's single block 1 is its block 3."""
    where = families / "hunyuan_video"
    group = [f"single_transformer_blocks.1.{leaf}" for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    more = [word for module in group for word in ("--keep-bf16", module)]
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", *more, preset="hunyuanvideo")
    assert outcome.exit_code == 0, outcome.stderr
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"single_blocks.1.linear1", "Hunyuan.single_blocks.3.linear1"} <= set(ignore)
    assert not [entry for entry in ignore if entry.endswith(("single_blocks.2.linear1", "single_blocks.0.linear1"))]


def test_hunyuan_single_blocks_are_fused_with_the_mlp(families: Path, tmp_path: Path) -> None:
    where = families / "hunyuan_video"
    more = ["--keep-bf16", "single_transformer_blocks.1.proj_mlp"]
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", *more, preset="hunyuanvideo")
    assert outcome.exit_code == 3 and outcome.error_code == "preset.fused_group"
    assert "single_transformer_blocks.1.attn.to_q" in outcome.message


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
    # Eight blocks: the first three and the last four are kept, one of which ModelOpt had packed.
    packed = {name.split(".")[1] for name, tensor in out.items() if tensor.dtype == torch.uint8}
    assert packed == {"3"}
    assert "blocks.4.attn1.to_q" in config_of(tmp_path / "out")["quantization_config"]["ignore"]


def test_a_base_of_less_precision_is_the_base_all_the_same_and_told(families: Path, tmp_path: Path) -> None:
    """A BF16 copy of the original, of which the export keeps some tensors in F32."""

    def narrow(tensors: Tensors) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    original = families / "wan" / "base"
    export, coarse = families / "wan" / "nvfp4", edit(original, tmp_path / "base", narrow)
    preset = wan_preset(tmp_path / "wan.toml", '["**.scale_shift_table", "blocks.*.norm2.*"]')
    outcome = build(export, coarse, tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    told = [one["message"] for one in outcome.report["warnings"] if one["code"] == "base.coarser"]
    out, source = load(tmp_path / "out"), load(coarse)
    exported = load(export / "transformer")
    wide = [name for name in source if exported[name].dtype == torch.float32]
    assert len(told) == 1 and f"{len(wide)} unquantized tensors of the base" in told[0]
    assert all(same_bits(out[name], source[name]) for name in wide)
    assert outcome.report["proof"]["words"] == "proven"
    whole = build(export, original, tmp_path / "whole", preset=str(preset))
    assert whole.report is not None and "base.coarser" not in [one["code"] for one in whole.report["warnings"]]
    for checkpoint, base in ((tmp_path / "whole", coarse), (tmp_path / "out", original)):
        assert run_mopt("verify", checkpoint, "--base", base).exit_code == 0


def test_a_keep_fp32_pattern_that_matches_nothing_is_an_error(families: Path, tmp_path: Path) -> None:
    preset = wan_preset(tmp_path / "wan.toml", '["blocks.*.norm9.*"]')
    where = families / "wan"
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 3 and outcome.error_code == "preset.no_match" and "norm9" in outcome.message


def test_fused_scales_that_differ_are_reported_and_pass(families: Path, tmp_path: Path) -> None:
    """ModelOpt does not unify q, k and v of Wan's attn2 (k and v only); SGLang brings them to one scale."""
    where = families / "wan"
    preset = wan_preset(tmp_path / "wan.toml", "[]")
    outcome = build(where / "nvfp4", where / "base", tmp_path / "out", preset=str(preset))
    assert outcome.exit_code == 0 and outcome.report is not None
    differ = outcome.report["proof"]["fused_scales_differ"]
    assert list(differ) == ["blocks.3.attn2.to_q, blocks.3.attn2.to_k, blocks.3.attn2.to_v"]
    assert "export.fused_scales" in {warning["code"] for warning in outcome.report["warnings"]}


def test_scales_of_what_the_loader_joins_have_a_dimension(families: Path, tmp_path: Path) -> None:
    """SGLang joins HunyuanVideo's q, k and v (and proj_mlp) with torch.cat, which takes no scale of no dimension."""
    where = families / "hunyuan_video"
    assert build(where / "nvfp4", where / "base", tmp_path / "out", preset="hunyuanvideo").exit_code == 0
    out = load(tmp_path / "out")
    for role in ("weight_scale_2", "input_scale"):
        parts = [out[f"single_transformer_blocks.0.{name}.{role}"] for name in ("attn.to_q", "attn.to_k", "proj_mlp")]
        assert torch.cat(parts).shape == (3,)
        alone = out[f"single_transformer_blocks.0.proj_out.{role}"]
        assert alone.shape == ()  # as ModelOpt writes it
