"""What convert-fp8 casts and dequantizes, byte for byte: against ModelOpt's own exporter and plain arithmetic."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from families import allowed
from faults import seeded_weight
from fp8_support import (
    E4M3,
    PACKED,
    REPLACED,
    ROLES,
    checkpoint_of,
    convert,
    fp8_refused,
    modelopt_cast,
    old_export,
    packed_modules,
    quotient,
    small_fp8_pair,
    small_old_pair,
    state_dict,
    two_weights,
    warnings_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Tensors, edit, load, same_bits

BF16_RULE, F16_RULE, F32_RULE = "quotient in BF16", "quotient in F16", "quotient in F32"
SCALE_RULE = "quotient in BF16, scale rounded to BF16"
RULES = (BF16_RULE, F16_RULE, F32_RULE, SCALE_RULE)


@pytest.mark.parametrize(
    ("variant", "rule"),
    [
        ("fp8", BF16_RULE),
        ("fp8_sharded", BF16_RULE),
        ("fp8_fp16", F16_RULE),
        ("fp8_compressed", SCALE_RULE),
    ],
)
def test_each_rule_of_modelopt_is_recognised_and_named(
    variant: str, rule: str, exports: Path, base: Path, tmp_path: Path
) -> None:
    """All four exports have one config and differ in up to 3 % of their bytes."""
    outcome = convert(exports / variant, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    # What is left in BF16 is taken from the base, and its codes are not written.
    assert proof["counts"] == {"reproduced": 24, "reproduced (sampled rows)": 16}
    # The rule that is named explains every byte, and in all no other one does.
    export, weights = load(exports / variant / "transformer"), load(base / "transformer")
    explained = Counter[str]()
    for module, found in proof["modules"].items():
        codes, scale = export[f"{module}.weight"], export[f"{module}.weight_scale"]
        explaining = {one for one in RULES if same_bits(quotient(weights[f"{module}.weight"], scale, one), codes)}
        assert found["rule"] in explaining, module
        explained.update(explaining)
    assert [one for one, count in explained.items() if count == 40] == [rule]


def test_a_trained_export_is_near_and_has_no_rule(exports: Path, base: Path, tmp_path: Path) -> None:
    """Such an export is refused; where it is accepted, nothing calls it proven."""
    fp8_refused(exports / "fp8_trained", base, tmp_path, code="check.proof", exit_code=1, names=("40 of 40", "near"))
    outcome = convert(exports / "fp8_trained", base, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    assert (proof["status"], proof["words"]) == ("not proven", "not proven: near")
    assert proof["counts"] == {"near": 40}
    assert "proof.near" in warnings_of(outcome)
    assert all(0.02 < module["relative_error"] < 0.1 for module in proof["modules"].values())
    assert {module["rule"] for module in proof["modules"].values()} == {None}
    for name in ("README.md", "mopt.json"):
        assert "not proven: near" in (tmp_path / "out" / name).read_text().lower(), name
    assert "no base was given" not in (tmp_path / "out" / "README.md").read_text()


def test_max_error_decides_where_codes_are_not_reproduced(exports: Path, base: Path, tmp_path: Path) -> None:
    outcome = convert(exports / "fp8_trained", base, tmp_path / "out", "--max-error", "0.01")
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and "40 of 40" in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "with_base"),
    [("fp8", True), ("fp8", False), ("fp8_fp16", True), ("fp8_fp16", False), ("fp8_trained", False)],
)
def test_an_old_export_becomes_what_modelopt_exports_today(
    variant: str, with_base: bool, exports: Path, base: Path, tmp_path: Path
) -> None:
    """Same model, same calibration: cast by mopt from BF16 and amax, and by ModelOpt itself."""
    today = exports / variant
    old = old_export(today, tmp_path / "old")
    assert packed_modules(load(old)) == set()
    beside = base if with_base else None
    more = ("--checkpoint", checkpoint_of(today))
    outcome = convert(old, beside, tmp_path / "out", *more, preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    expected, out = load(today / "transformer"), load(tmp_path / "out")
    modules = packed_modules(expected)
    assert packed_modules(out) == modules and len(modules) == 40
    for module in modules:
        assert same_bits(out[f"{module}.weight"], expected[f"{module}.weight"]), module
        for role in ROLES:
            assert same_bits(out[f"{module}.{role}"], expected[f"{module}.{role}"].reshape(1)), module
    assert "export.clipped" not in warnings_of(outcome) and outcome.report["clipped"] == {}
    if with_base:
        assert outcome.report["proof"]["counts"] == {"reproduced": 40}


def test_the_weights_of_an_old_export_must_be_the_bases(exports: Path, base: Path, tmp_path: Path) -> None:
    """They are there in full, so that being near is not enough."""
    today = exports / "fp8_trained"
    old = old_export(today, tmp_path / "old")
    more = ("--checkpoint", checkpoint_of(today))
    fp8_refused(old, base, tmp_path, *more, code="export.other_base", names=("40 unquantized tensors",), preset="none")


def test_an_old_export_is_converted_like_todays(fp8: Path, base: Path, built_fp8: Path, tmp_path: Path) -> None:
    """With preset and base, not a byte tells which of the two it came from."""
    old = old_export(fp8, tmp_path / "old")
    outcome = convert(old, base, tmp_path / "out", "--checkpoint", checkpoint_of(fp8))
    assert outcome.exit_code == 0, outcome.stderr
    expected, out = load(built_fp8), load(tmp_path / "out")
    assert out.keys() == expected.keys()
    assert [name for name in out if not same_bits(out[name], expected[name])] == []
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (built_fp8 / name).read_bytes()


def test_a_checkpoint_fills_in_scales_that_the_export_lacks(
    exports: Path, base: Path, built_fp8: Path, tmp_path: Path
) -> None:
    """Packed weights without input scales, and the checkpoint of a calibrated run of the same model."""
    more = ("--checkpoint", checkpoint_of(exports / "fp8"))
    outcome = convert(exports / "fp8_uncalibrated", base, tmp_path / "out", *more)
    assert outcome.exit_code == 0, outcome.stderr
    out, expected = load(tmp_path / "out"), load(built_fp8)
    assert out.keys() == expected.keys()
    assert [name for name in out if not same_bits(out[name], expected[name])] == []


@pytest.mark.parametrize("family", ["flux2", "wan", "qwen_image", "hunyuan_video", "ltx2"])
def test_old_exports_of_other_families_are_cast_by_a_rule_that_is_named(
    family: str, families: Path, tmp_path: Path
) -> None:
    """Wan's exporter divides in F32, since a table of its model is; an old export shows that as well."""
    today = families / family / "fp8"
    old = old_export(today, tmp_path / "old")
    more = ("--checkpoint", checkpoint_of(today), *allowed(family, "fp8"))
    outcome = convert(old, families / family / "base", tmp_path / "out", *more, preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, weights, exported = load(tmp_path / "out"), load(old), load(today / "transformer")
    modules = packed_modules(exported)
    assert packed_modules(out) == modules
    rules = {name: module["rule"] for name, module in outcome.report["proof"]["modules"].items()}
    assert rules.keys() == modules
    for module in modules:
        scale = out[f"{module}.weight_scale"]
        assert same_bits(scale, exported[f"{module}.weight_scale"].reshape(1))
        assert same_bits(out[f"{module}.weight"], quotient(weights[f"{module}.weight"], scale[0], rules[module]))
        if family != "wan":
            assert same_bits(out[f"{module}.weight"], exported[f"{module}.weight"]), module


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    size=st.sampled_from([1e-20, 1e-6, 1.0, 3e4, 1e30]),
    shrink=st.sampled_from([1.0, 0.9, 0.25]),
)
def test_the_cast_is_modelopts_on_any_weight(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, columns: int, size: float, shrink: float
) -> None:
    """``to_quantized_weight`` of its exporter; with a calibrated amax below the weight's, what it saturates too."""
    weight = (seeded_weight(rows, columns, seed).float() * size).to(torch.bfloat16)
    weight[0, 0] = size
    other = seeded_weight(16, 16, seed + 1)
    amax = (weight.abs().max().float() * shrink).to(torch.bfloat16)
    room = tmp_path_factory.mktemp("cast")
    export, checkpoint = small_old_pair(
        room, {"lin": weight, "other": other}, {"lin": amax, "other": other.abs().max()}
    )
    outcome = convert(export, None, room / "out", "--checkpoint", checkpoint, preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out = load(room / "out")
    scale = amax.float() / 448
    assert same_bits(out["lin.weight_scale"], scale.reshape(1))
    assert same_bits(out["lin.weight"], modelopt_cast(weight, scale))
    assert not bool(out["lin.weight"].float().isnan().any())
    # Counted by division alone.
    ratio = (weight.float() / scale).abs()
    beyond = int((ratio > 464).sum())  # what rounds to 448 anyway is not lost
    reported = outcome.report["clipped"].get("lin")
    if beyond:
        assert beyond <= reported["count"] <= int((ratio > 448).sum())
        assert reported["largest"] == pytest.approx(float(ratio.max()), rel=2**-8)
        assert "lin" in warnings_of(outcome)["export.clipped"]
    else:
        assert reported is None or bool((ratio > 448).any())


@pytest.mark.parametrize(("factor", "count"), [(1.0, 0), (0.5, 3)])
def test_what_is_clipped_is_counted_and_measured(factor: float, count: int, tmp_path: Path) -> None:
    """A stale amax: torch saturates 465 and 537 without a word, other casts make NaN of them."""
    weights = two_weights()
    weight = torch.full((16, 16), 0.25, dtype=torch.bfloat16)
    weight[2, 3], weight[5, 5], weight[15, 0] = 1.0, -0.75, 0.625
    weights["lin"] = weight
    amax = {name: one.abs().max() for name, one in weights.items()}
    amax["lin"] = amax["lin"] * factor
    export, checkpoint = small_old_pair(tmp_path, weights, amax)
    outcome = convert(export, None, tmp_path / "out", "--checkpoint", checkpoint, preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    codes = load(tmp_path / "out")["lin.weight"].float()
    assert float(codes.abs().max()) == 448 and int((codes.abs() == 448).sum()) == max(count, 1)
    if count:
        assert outcome.report["clipped"] == {"lin": {"count": 3, "largest": pytest.approx(896.0, rel=1e-2)}}
        message = warnings_of(outcome)["export.clipped"]
        assert "3" in message and "lin" in message and "export.clipped" in outcome.stderr
    else:
        assert outcome.report["clipped"] == {} and "export.clipped" not in warnings_of(outcome)


def test_clipping_that_costs_too_much_fails_the_proof(tmp_path: Path) -> None:
    """Against a base the clipped values are simply missing."""
    weights = two_weights()
    amax = {"lin": weights["lin"].abs().max() / 8, "other": weights["other"].abs().max()}
    export, checkpoint = small_old_pair(tmp_path, weights, amax)
    base = edit(export, tmp_path / "base", change_config=lambda config: config.pop("quantization_config"))
    outcome = convert(export, base, tmp_path / "out", "--checkpoint", checkpoint, preset="none")
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and "lin" in outcome.message
    assert not (tmp_path / "out").exists()


def test_clipping_that_costs_a_sampled_row_more_than_the_weight_is_judged_by_the_weight(tmp_path: Path) -> None:
    """The closing step looks at sampled rows; all rows were compared by then."""
    weights = {"lin": seeded_weight(2048, 256, 1), "other": seeded_weight(16, 16, 2)}
    weights["lin"][0, 0] = 300.0  # the first row is always sampled
    amax = {"lin": torch.tensor(260.0), "other": weights["other"].abs().max()}
    export, checkpoint = small_old_pair(tmp_path, weights, amax)
    base = edit(export, tmp_path / "base", change_config=lambda config: config.pop("quantization_config"))
    outcome = convert(export, base, tmp_path / "out", "--checkpoint", checkpoint, preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    assert proof["words"] == "proven" and proof["modules"]["lin"]["verdict"] == "nearest", proof
    assert outcome.report["clipped"]["lin"]["count"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_old_exports_in_other_floats_are_cast_in_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """ModelOpt's default dtype is Half: its quotients are rounded to F16, not to BF16."""
    weights = {name: weight.to(dtype) for name, weight in two_weights().items()}
    weights["lin"] *= 1.0009765625  # a value that F16 holds and BF16 does not
    amax = {name: weight.abs().max() for name, weight in weights.items()}
    export, checkpoint = small_old_pair(tmp_path, weights, amax)
    assert convert(export, None, tmp_path / "out", "--checkpoint", checkpoint, preset="none").exit_code == 0
    out = load(tmp_path / "out")
    for name, weight in weights.items():
        assert same_bits(out[f"{name}.weight"], modelopt_cast(weight, amax[name].float() / 448)), name


def test_without_a_base_kept_modules_are_dequantized_and_said(fp8: Path, tmp_path: Path) -> None:
    """Never codes without their scale."""
    outcome = convert(fp8, None, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    report, out, export = outcome.report, load(tmp_path / "out"), load(fp8 / "transformer")
    packed = packed_modules(out)
    replaced = packed_modules(export) - packed
    assert REPLACED in replaced and PACKED in packed
    for module in replaced:
        expected = (export[f"{module}.weight"].float() * export[f"{module}.weight_scale"]).to(torch.bfloat16)
        assert same_bits(out[f"{module}.weight"], expected), module
        assert "dequantized" in report["ledger"]["export"][f"{module}.weight"]
        assert f"{module}.weight_scale" not in out and f"{module}.input_scale" not in out
    dequantized = {name for name, fate in report["ledger"]["export"].items() if "dequantized" in fate}
    assert dequantized == {f"{module}.weight" for module in replaced}
    assert report["proof"]["status"] == "not proven" and "proof.none" in warnings_of(outcome)
    assert report["output"]["published"] is True and "base" not in report["inputs"]
    # What is not quantized comes from the export, in BF16; there is nothing else.
    scales = {f"{module}.{role}" for module in packed for role in ROLES}
    plain = {name for name in export if "_quantizer." not in name and not name.endswith(ROLES)}
    assert out.keys() == plain | scales
    for name in plain - {f"{module}.weight" for module in replaced}:
        assert same_bits(out[name], export[name]), name


def test_without_a_base_half_becomes_bf16(exports: Path, tmp_path: Path) -> None:
    export = exports / "fp8_fp16"
    outcome = convert(export, None, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, source = load(tmp_path / "out"), load(export / "transformer")
    assert {tensor.dtype for tensor in out.values()} == {E4M3, torch.float32, torch.bfloat16}
    for name, tensor in out.items():
        if tensor.dtype == torch.bfloat16 and source[name].dtype == torch.float16:
            assert same_bits(tensor, source[name].to(torch.bfloat16)), name


def test_not_proven_is_in_card_and_manifest(fp8: Path, base: Path, tmp_path: Path) -> None:
    """Who gets the folder must be able to tell."""
    assert convert(fp8, None, tmp_path / "out").exit_code == 0
    assert convert(fp8, base, tmp_path / "sampled", "--proof", "sampled").exit_code == 0
    for folder, words in (("out", "not proven: no base"), ("sampled", "not proven: sampled")):
        for name in ("README.md", "mopt.json"):
            assert words in (tmp_path / folder / name).read_text().lower(), (folder, name)


def test_a_scale_of_shape_one_is_taken_like_one_without_dimensions(tmp_path: Path) -> None:
    """SGLang's own builder writes them so."""
    export, base = small_fp8_pair(tmp_path / "made", two_weights(), {})

    def reshape(tensors: Tensors) -> None:
        for name in [one for one in tensors if one.endswith(ROLES)]:
            tensors[name] = tensors[name].reshape(1)

    other = edit(export, tmp_path / "export", reshape)
    assert convert(export, base, tmp_path / "out", preset="none").exit_code == 0
    assert convert(other, base, tmp_path / "other", preset="none").exit_code == 0
    left, right = load(tmp_path / "out"), load(tmp_path / "other")
    assert left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def test_the_checkpoint_is_as_modelopt_saves_it(fp8: Path) -> None:
    """What these tests rest on: unquantized weights of full size, one amax a quantizer, in the model's dtype."""
    found = torch.load(checkpoint_of(fp8), weights_only=True)
    assert found.keys() == {"modelopt_state", "model_state_dict"}
    state = state_dict(checkpoint_of(fp8))
    assert state[f"{PACKED}.weight"].dtype == torch.bfloat16
    amax = {name: tensor for name, tensor in state.items() if name.endswith("_amax")}
    assert len(amax) > 80 and {(tensor.dtype, tensor.ndim) for tensor in amax.values()} == {(torch.bfloat16, 0)}
    assert f"{PACKED}.weight_quantizer._amax" in amax and f"{PACKED}.input_quantizer._amax" in amax
