"""Packed weights that are not the base's: a layout that cannot be written (exit 3), and damage (exit 1)."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from faults import PACKED, REPLACED, entries, quantize, reciprocal, refused, small_pair, swapped, swizzle
from producers import fp8_bf16, lora_merged, max_calibration
from support import Tensors, build, edit, load, packed_in, run_mopt, same_bits

Change = Callable[[Tensors, Iterable[str]], None]

# Scales of these keep their shape when swizzled: rows are a multiple of 128, blocks of 4. One has two tiles each way.
SHAPES = {"one_tile": (128, 64), "four_tiles": (256, 128), "wide": (128, 256)}


def swizzled(tensors: Tensors, modules: Iterable[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_scale"] = swizzle(tensors[f"{module}.weight_scale"])


LAYOUTS: dict[Change, str] = {
    swapped: "the even column in the high nibble",
    swizzled: "the scales in the 128x4 order",
}
COMBINATIONS = [[swapped], [swizzled], [swapped, swizzled]]


def relaid(export: Path, target: Path, changes: Sequence[Change], modules: Iterable[str]) -> Path:
    """A copy laid out in another way, of which nothing tells: names, dtypes and shapes are those of a right one."""

    def change(tensors: Tensors) -> None:
        for one in changes:
            one(tensors, modules)

    edit(export, target, change)
    before, after = load(export), load(target)
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()}
    assert kinds == {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()}
    assert any(not same_bits(tensor, after[name]) for name, tensor in before.items())
    return target


@pytest.mark.parametrize("changes", COMBINATIONS)
@pytest.mark.parametrize("modules", [tuple(SHAPES), *((name,) for name in SHAPES)])
def test_other_layouts_are_put_in_order_and_said(
    modules: tuple[str, ...], changes: list[Change], tmp_path: Path
) -> None:
    """In all modules or in one: taken for canonical, any of them would be noise."""
    right, base = small_pair(tmp_path / "made", SHAPES)
    export = relaid(right, tmp_path / "export", changes, modules)
    assert build(right, base, tmp_path / "right", preset="none").exit_code == 0
    outcome = build(export, base, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    warnings = [one["message"] for one in outcome.report["warnings"] if one["code"] == "export.layout"]
    found = [f"{len(modules)} of 3 modules have {LAYOUTS[one]}" for one in changes]
    assert [message.partition(";")[0] for message in warnings] == found
    expected, out = load(tmp_path / "right"), load(tmp_path / "out")
    assert expected.keys() == out.keys()
    assert [name for name in expected if not same_bits(expected[name], out[name])] == []


@pytest.mark.parametrize("more", [[], [swapped], [swizzled], [swapped, swizzled]])
@pytest.mark.parametrize("modules", [tuple(SHAPES), ("wide",)])
def test_a_reciprocal_global_scale_is_refused(modules: tuple[str, ...], more: list[Change], tmp_path: Path) -> None:
    """compressed-tensors divides by its global scale; under ModelOpt's name that is no mere layout."""
    right, base = small_pair(tmp_path / "made", SHAPES)
    export = relaid(right, tmp_path / "export", [reciprocal, *more], modules)
    names = (str(export), f"{len(modules)} of 3 modules", "reciprocal weight_scale_2: ", min(modules))
    refused(export, base, tmp_path, code="export.layout", names=names, preset="none")


def test_a_real_export_with_reciprocal_global_scales_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    scales = [name for name in load(nvfp4 / "transformer") if name.endswith(".weight_scale_2")]
    modules = [name.removesuffix(".weight_scale_2") for name in scales]
    export = relaid(nvfp4 / "transformer", tmp_path / "export", [reciprocal], modules)
    refused(export, base, tmp_path, code="export.layout", names=("40 of 40 modules", "reciprocal"))


def test_a_replaced_module_with_a_reciprocal_global_scale_is_refused_too(
    nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Its bytes would not be used, but they tell that the export is not what it seems."""
    export = relaid(nvfp4 / "transformer", tmp_path / "export", [reciprocal], [REPLACED])
    refused(export, base, tmp_path, code="export.layout", names=("1 of 40 modules", REPLACED))


@pytest.mark.parametrize("ambiguous", [False, True])
def test_a_layout_that_cannot_be_told_is_refused(ambiguous: bool, tmp_path: Path) -> None:
    """Trained weights whose columns come in pairs: with the nibbles swapped they are as near to the base as without."""
    _, base = small_pair(tmp_path / "made", {"lin": (64, 64), "other": (64, 64)})
    generator = torch.Generator().manual_seed(2)

    def pair_columns(tensors: Tensors) -> None:
        if ambiguous:
            tensors["lin.weight"][:, 1::2] = tensors["lin.weight"][:, 0::2] * 1.05

    base = edit(base, tmp_path / "base", pair_columns)
    weight = load(base)["lin.weight"]
    trained = (weight * (1 + 0.03 * torch.randn(weight.shape, generator=generator))).to(weight.dtype)

    def requantize(tensors: Tensors) -> None:
        tensors |= quantize("lin", trained)
        swapped(tensors, ["lin"])

    export = edit(tmp_path / "made" / "export", tmp_path / "export", requantize)
    if ambiguous:
        names = (str(export), "1 of 2 modules", "several layouts", ": lin")
        refused(export, base, tmp_path, code="export.layout", names=names, hint="proven", preset="none")
        return
    refused(export, base, tmp_path, code="check.proof", exit_code=1, names=("1 of 2", "lin (row"), preset="none")
    outcome = build(export, base, tmp_path / "out", "--accept-near", preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["counts"] == {"reproduced": 1, "near": 1}
    assert "1 of 2 modules have the even column in the high nibble" in outcome.stderr


def test_the_swizzle_of_these_tests_is_cublas_order() -> None:
    """Positions given in cuBLAS's documentation of the 1D block scaling layout: (row, column) to offset."""
    scale = torch.arange(256 * 8).to(torch.uint8).view(256, 8)
    flat = swizzle(scale).flatten()
    for (row, column), offset in {
        (0, 0): 0,
        (0, 3): 3,
        (1, 0): 16,
        (31, 0): 496,
        (32, 0): 4,
        (127, 3): 511,
        (0, 4): 512,
        (128, 0): 1024,
        (255, 7): 2047,
    }.items():
        assert int(flat[offset]) == int(scale[row, column])


def rolled_rows(tensors: Tensors) -> None:
    for role in ("weight", "weight_scale"):
        raw = tensors[f"{PACKED}.{role}"].view(torch.uint8)
        tensors[f"{PACKED}.{role}"] = raw.roll(1, dims=0).view(tensors[f"{PACKED}.{role}"].dtype)


def global_scale_off(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale_2"] *= 1.05


def zeroed_row(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"][0] = 0


def dropped_columns(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"][:, 3] = 0  # codes of columns 6 and 7


def small_scales(tensors: Tensors) -> None:
    scale = tensors[f"{PACKED}.weight_scale"]
    scale[0] = (scale[0].float() / 4).to(scale.dtype)


def weak_row(tensors: Tensors) -> None:
    scale = tensors[f"{PACKED}.weight_scale"]
    scale[0] = (scale[0].float() * 0.65).to(scale.dtype)


DAMAGES = [rolled_rows, global_scale_off, zeroed_row, dropped_columns, small_scales, weak_row]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_module_fails_the_check_and_is_named(
    damage: Callable[[Tensors], None], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", damage)
    before = entries(tmp_path)
    saved = tmp_path / "report.json"
    outcome = build(export, base, tmp_path / "out", "--report-json", saved)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof"), outcome.stderr
    assert "1 of 40 packed modules" in outcome.message and PACKED in outcome.message
    assert "Nothing was published" in outcome.message
    # The report is written all the same, and is the only thing that is.
    report = json.loads(saved.read_text())
    assert report == outcome.report
    saved.unlink()
    assert entries(tmp_path) == before
    assert (report["status"], report["exit_code"], report["proof"]["status"]) == ("mismatch", 1, "fail")
    assert report["output"]["published"] is False
    modules = report["proof"]["modules"]
    failing = {name for name, module in modules.items() if module["verdict"] != "reproduced"}
    assert len(modules) == 40 and failing == {PACKED}
    assert modules[PACKED]["codes_equal"] < modules[PACKED]["codes"]
    limits = {
        "rolled_rows": modules[PACKED]["relative_error"] > 1.0,
        "global_scale_off": modules[PACKED]["gain"] == pytest.approx(1.05, abs=0.01),
        "zeroed_row": modules[PACKED]["worst_row"] == pytest.approx(1.0),
        "dropped_columns": modules[PACKED]["worst_column"] == pytest.approx(1.0),
        "small_scales": modules[PACKED]["worst_row"] > 0.5,
        "weak_row": 0.3 < modules[PACKED]["worst_row"] < 0.5,
    }
    assert limits[damage.__name__]


@pytest.mark.parametrize(
    ("damage", "limit"), [(global_scale_off, "gain"), (dropped_columns, "worst_column"), (weak_row, "worst_row")]
)
def test_relative_error_alone_would_let_it_pass(
    damage: Callable[[Tensors], None], limit: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Which is why the other limits exist, one for each kind of damage; --max-error cannot loosen them."""
    export = edit(nvfp4, tmp_path / "export", damage)
    outcome = build(export, base, tmp_path / "out", "--max-error", "10")
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and outcome.report is not None
    found = outcome.report["proof"]["modules"][PACKED]
    assert found["relative_error"] < 0.15
    beyond = {
        "gain": abs(found["gain"] - 1.0) > 0.025,
        "worst_row": found["worst_row"] > 0.3,
        "worst_column": found["worst_column"] > 0.7,
    }
    assert [name for name, is_beyond in beyond.items() if is_beyond] == [limit]


def test_damage_in_a_replaced_module_fails_the_check_too(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors[f"{REPLACED}.weight"][0].zero_())
    refused(export, base, tmp_path, code="check.proof", exit_code=1, names=(REPLACED,))


def test_a_few_modules_of_other_weights_fail_the_check(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Not enough of them to say that the whole base is another."""
    modules = [f"single_transformer_blocks.{block}.{leaf}" for block in (0, 1) for leaf in ("proj_out", "norm.linear")]
    weights = load(base / "transformer")

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(3)
        for module in modules:
            weight = weights[f"{module}.weight"]
            other = quantize(module, torch.randn(weight.shape, generator=generator).to(weight.dtype))
            tensors.update({name: tensor for name, tensor in other.items() if not name.endswith("input_scale")})

    export = edit(nvfp4, tmp_path / "export", change)
    outcome = refused(export, base, tmp_path, code="check.proof", exit_code=1, names=("4 of 40", *modules))
    assert outcome.report is not None
    counts = {"reproduced": 22, "reproduced (sampled rows)": 14, "unrelated": 4}
    assert outcome.report["proof"]["counts"] == counts


def test_max_error_decides_where_codes_are_not_reproduced(exports: Path, base: Path, tmp_path: Path) -> None:
    """A real export of weights trained a little further: near the base, not quantized from it."""
    export = exports / "nvfp4_trained"
    refused(export, base, tmp_path, code="check.proof", exit_code=1, names=("40 of 40",), hint="--accept-near")
    outcome = build(export, base, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["proof"]["counts"] == {"near": 40}
    assert "proof.near" in {one["code"] for one in outcome.report["warnings"]}
    found = {name: one["relative_error"] for name, one in outcome.report["proof"]["modules"].items()}
    limit = sorted(found.values())[len(found) // 2]
    (tmp_path / "strict").mkdir()
    more = ("--max-error", str(limit), "--accept-near")
    refusal = refused(export, base, tmp_path / "strict", *more, code="check.proof", exit_code=1)
    # What sampled rows refute is compared whole and refused at once, before the others are.
    assert refusal.report is not None
    refuted = {name for name, one in refusal.report["proof"]["modules"].items() if one["verdict"] == "mismatch"}
    assert any(found[name] > limit for name in refuted)
    assert all(found[name] > 0.98 * limit for name in refuted)  # a strip of 128 rows may be what is beyond it
    assert f"{len(refuted)} of 40" in refusal.message and min(refuted) in refusal.message


@pytest.mark.parametrize("factor", [1 / 8, 1 / 64])
def test_a_stale_global_scale_is_seen_although_its_codes_are_reproduced(
    nvfp4: Path, base: Path, tmp_path: Path, factor: float
) -> None:
    """Quantized with a global scale far too small it all saturates: the codes are what the base gives, and useless."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    module = "single_transformer_blocks.1.proj_out"
    weight = load(base / "transformer")[f"{module}.weight"]

    def requantize(tensors: Tensors) -> None:
        scale_2 = tensors[f"{module}.weight_scale_2"] * factor
        oracle, scale, _ = NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=scale_2)
        tensors[f"{module}.weight"] = oracle._quantized_data
        tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"] = scale, scale_2

    outcome = build(edit(nvfp4, tmp_path / "export", requantize), base, tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and module in outcome.message
    assert outcome.report is not None
    found = outcome.report["proof"]["modules"][module]
    assert found["codes_equal"] == found["codes"] and found["relative_error"] > 0.15


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_a_merged_lora_is_refused_and_never_called_proven(
    algorithm: str, exports: Path, base: Path, tmp_path: Path
) -> None:
    """The base is that without the LoRA: modules kept in BF16 would come from another model than the packed ones."""
    weights = load(base / "transformer")
    adapted = [name for name in packed_in(load(exports / "nvfp4" / "transformer")) if ".attn." in name]

    def merge(tensors: Tensors) -> None:
        for seed, name in enumerate(adapted):
            merged = lora_merged(weights[f"{name}.weight"].bfloat16(), seed, rank=16, strength=0.02)
            made = max_calibration(merged) if algorithm == "nvfp4" else fp8_bf16(merged)
            for role, tensor in zip(("weight", "weight_scale", "weight_scale_2"), made, strict=False):
                tensors[f"{name}.{role}"] = tensor.reshape(tensors[f"{name}.{role}"].shape)

    export = edit(exports / algorithm, tmp_path / "export", merge)
    command = "build-nvfp4" if algorithm == "nvfp4" else "convert-fp8"
    words = (command, "--preset", "flux1-dev", "--export", export, "--base", base, "--output", tmp_path / "out")
    outcome = run_mopt(*words)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and "--accept-near" in outcome.message
    assert any(name in outcome.message for name in adapted) and not (tmp_path / "out").exists()
    outcome = run_mopt(*words, "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["proof"]["words"] == "not proven: near"
    near = {name for name, one in outcome.report["proof"]["modules"].items() if one["verdict"] == "near"}
    assert near == set(adapted)
    assert any("two models may be mixed" in one["message"] for one in outcome.report["warnings"])
    assert "**Not proven: near**" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "mopt.json").read_text())["proof"]["words"] == "not proven: near"
    verified = run_mopt("verify", tmp_path / "out", "--base", base)
    assert verified.exit_code == 1 and verified.report is not None
    assert verified.report["verify"]["proof"] == "not proven: near"


def test_a_module_that_the_base_replaces_is_not_near_with_a_wrong_row(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """A row that is sampled, in a module kept in BF16: most codes are right, and the row is far beyond the limit."""

    def change(tensors: Tensors) -> None:
        tensors[f"{REPLACED}.weight"][0, :20] ^= 0x77

    export = edit(nvfp4, tmp_path / "export", change)
    names = ("1 of 40 packed modules are not the base's", f"{REPLACED} (row 0, column 0: expected code")
    refused(export, base, tmp_path, code="check.proof", exit_code=1, names=names)
