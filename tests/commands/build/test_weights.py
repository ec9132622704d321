"""build-nvfp4 --weights: better block scales of a base, told everywhere, and proven by running the rule again."""

import json
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from families import ALL, allowed
from producers import Packed, block_errors, max_calibration, ten_scales
from support import Outcome, Tensors, build, config_of, edit, load, packed_in, run_mopt, same_bits, tree
from verify_support import verify

RULE = "a sweep of block scales"
SWEEP = ("--weights", "sweep")
PACKED = "single_transformer_blocks.0.proj_out"
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def swept(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("swept") / "out"
    outcome = build(None, exports / "base", out, *SWEEP)
    assert outcome.exit_code == 0, outcome.stderr
    return out, outcome


def packed(tensors: Tensors, module: str) -> Packed:
    return Packed(*(tensors[f"{module}.{role}"] for role in ("weight", "weight_scale", "weight_scale_2")))


def test_every_block_is_the_rules_and_all_else_is_max_calibrations(
    exports: Path, swept: tuple[Path, Outcome], built_uncalibrated: Path
) -> None:
    out, common, base = load(swept[0]), load(built_uncalibrated), load(exports / "base/transformer")
    modules = packed_in(out)
    changed = {f"{module}.{role}" for module in modules for role in ("weight", "weight_scale")}
    assert modules and out.keys() == common.keys()
    assert all(same_bits(out[name], common[name]) for name in out.keys() - changed)
    assert config_of(swept[0]) == config_of(built_uncalibrated)
    for module in modules:
        weight, one = base[f"{module}.weight"], packed(out, module)
        expected = ten_scales(weight, one.global_scale)
        assert same_bits(one.packed, expected.packed) and same_bits(one.scale, expected.scale)
        after, before = block_errors(weight, one), block_errors(weight, max_calibration(weight, one.global_scale))
        assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < 0.9 * float(before.sum())


@pytest.mark.parametrize("family", ["wan", "qwen_image", "flux2"])
def test_families_are_built_and_proven(families: Path, tmp_path: Path, family: str) -> None:
    base = families / family / "base"
    outcome = build(None, base, tmp_path / "out", *SWEEP, *allowed(family), preset=ALL[family][0])
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    found = outcome.report["verify"]["modules"].values()
    assert {(one["verdict"], one["rule"]) for one in found} == {("nearest", RULE)}
    if fused := outcome.report["proof"]["fused_scales_differ"]:  # as many as without a sweep: scales are max's
        plain = build(None, base, tmp_path / "max", *allowed(family), preset=ALL[family][0])
        assert plain.report is not None and plain.report["proof"]["fused_scales_differ"] == fused


def test_workers_pieces_and_shards_change_no_byte(
    exports: Path, swept: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = build(None, exports / "base", tmp_path / "again", *SWEEP, "--workers", "3", "--verify", "off")
    assert again.exit_code == 0 and tree(tmp_path / "again") == tree(swept[0])
    monkeypatch.setattr("modelopt_convert.write.pieces._COMPUTED_BYTES", 5000)  # rows of 320 bytes: 15 at a time
    small = ("--max-shard-size", "700KB", "--workers", "1", "--verify", "off")
    assert build(None, exports / "base", tmp_path / "small", *SWEEP, *small).exit_code == 0
    whole, parts = load(swept[0]), load(tmp_path / "small")
    assert whole.keys() == parts.keys() and all(same_bits(one, parts[name]) for name, one in whole.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wider_base_is_rounded_to_bf16_first(exports: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def widen(tensors: Tensors) -> None:
        tensors |= {name: (tensor.float() * 1.003).to(dtype) for name, tensor in tensors.items()}

    base = edit(exports / "base", tmp_path / "base", widen)
    outcome = build(None, base, tmp_path / "out", *SWEEP)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert {one["rule"] for one in outcome.report["verify"]["modules"].values()} == {RULE}
    out, one = load(tmp_path / "out"), load(base / "transformer" if (base / "transformer").is_dir() else base)
    expected = ten_scales(one[f"{PACKED}.weight"].bfloat16(), out[f"{PACKED}.weight_scale_2"])
    assert same_bits(out[f"{PACKED}.weight"], expected.packed)


def test_it_is_said_everywhere(swept: tuple[Path, Outcome], built_uncalibrated: Path, exports: Path) -> None:
    out, outcome = swept
    report, record = outcome.report, json.loads((out / "mopt.json").read_text())
    assert report is not None and report["weights"] == record["weights"] == "sweep"
    told = [one["message"] for one in report["warnings"] if one["code"] == "build.uncalibrated"]
    assert len(told) == 1 and f"weights by {RULE}" in told[0] and f"weights by {RULE}" in report["proof"]["method"]
    card = (out / "README.md").read_text()
    assert "for each block the best of ten scales (`--weights sweep`)" in card
    assert f"weights by {RULE}" in verify(out, *CPU).report["verify"]["statement"]
    plain = json.loads((built_uncalibrated / "mopt.json").read_text())
    assert plain["weights"] == "max" and RULE not in (built_uncalibrated / "README.md").read_text()
    assert "weights by" not in verify(built_uncalibrated, *CPU).report["verify"]["statement"]
    shown = run_mopt("verify", out, *CPU, "--base", exports / "base", json_report=False)
    assert f"proof: 24 modules nearest ({RULE})" in shown.stdout


def test_a_dry_run_says_the_rule(exports: Path, tmp_path: Path) -> None:
    outcome = build(None, exports / "base", tmp_path / "out", *SWEEP, "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None and not (tmp_path / "out").exists()
    assert outcome.report["weights"] == "sweep" and f"weights by {RULE}" in outcome.stderr


def test_bytes_prove_it_and_no_record(exports: Path, swept: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Neither is a record needed, nor is one believed: max calibration's bytes are called what they are."""
    bare = edit(swept[0], tmp_path / "bare", None)
    (bare / "mopt.json").unlink(missing_ok=True)
    found = verify(bare, *CPU, "--base", exports / "base")
    assert found.exit_code == 0 and found.report is not None
    assert {one["rule"] for one in found.report["verify"]["modules"].values()} == {RULE}


def next_scale(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale"].view(torch.uint8)[3, 3] += 1


def another_code(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"][9, 9] ^= 0x10


@pytest.mark.parametrize("fault", [next_scale, another_code])
def test_a_planted_fault_is_seen(
    exports: Path, swept: tuple[Path, Outcome], tmp_path: Path, fault: Callable[[Tensors], None]
) -> None:
    bad = edit(swept[0], tmp_path / "bad", fault)
    (bad / "mopt.json").unlink(missing_ok=True)
    found = verify(bad, *CPU, "--base", exports / "base")
    assert found.exit_code == 1 and found.report is not None
    modules = found.report["verify"]["modules"]
    assert modules[PACKED]["verdict"] not in ("reproduced", "reproduced but for ties", "nearest")
    assert {one["rule"] for name, one in modules.items() if name != PACKED} == {RULE}


def test_a_scale_of_max_calibration_among_swept_ones_is_another_search(
    exports: Path, swept: tuple[Path, Outcome], built_uncalibrated: Path, tmp_path: Path
) -> None:
    """Every code is the nearest then, and no error above: a search, and not mopt's. The record claims more: exit 1."""
    common = load(built_uncalibrated)

    def mix(tensors: Tensors) -> None:
        for role in ("weight", "weight_scale"):
            tensors[f"{PACKED}.{role}"][:5] = common[f"{PACKED}.{role}"][:5]

    bad = edit(swept[0], tmp_path / "bad", mix)
    found = verify(bad, *CPU, "--base", exports / "base")
    assert found.report is not None and found.exit_code == 0
    one = found.report["verify"]["modules"][PACKED]
    assert one["verdict"] == "nearest" and one["rule"] != RULE
    (bad / "mopt.json").write_bytes((swept[0] / "mopt.json").read_bytes())
    found = verify(bad, *CPU, "--base", exports / "base")
    assert found.exit_code == 1 and f"{PACKED}: nearest, recorded as nearest ({RULE})" in found.stdout


def test_for_comfyui_its_values_are_the_same(families: Path, tmp_path: Path) -> None:
    base = families / "qwen_image" / "base"
    assert build(None, base, tmp_path / "out", *SWEEP, preset="qwen-image").exit_code == 0
    outcome = build(None, base, tmp_path / "comfy", *SWEEP, "--to", "comfyui", preset="qwen-image")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["weights"] == json.loads((tmp_path / "comfy/mopt.json").read_text())["weights"] == "sweep"
    mine, theirs = load(tmp_path / "out"), load(tmp_path / "comfy")
    modules = [name for name in packed_in(mine) if f"{name}.weight_scale" in theirs]
    assert modules
    for name in modules:
        roles = (theirs[f"{name}.{role}"] for role in ("weight", "weight_scale_2", "weight_scale"))
        one, rows = packed(mine, name), len(mine[f"{name}.weight"])
        values = comfy_kitchen.dequantize_nvfp4(*roles, torch.float32)[:rows, : 2 * one.packed.shape[1]]
        codes = torch.stack((one.packed % 16, one.packed // 16), -1).flatten(-2)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        expected = torch.cat((table, -table))[codes.long()] * (one.scale.float() * one.global_scale).repeat_interleave(
            16, -1
        )
        assert torch.equal(values, expected)


def test_it_is_for_a_base_alone(exports: Path, tmp_path: Path) -> None:
    outcome = build(exports / "nvfp4", exports / "base", tmp_path / "out", *SWEEP)
    assert outcome.exit_code == 2 and not (tmp_path / "out").exists()
    assert "sweep is for a base alone: an export has its scales; leave --export out" in outcome.stdout + outcome.stderr
