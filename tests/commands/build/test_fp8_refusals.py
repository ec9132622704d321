"""Exports that convert-fp8 refuses, and damage that its proof finds: the module is named, nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import OTHER_ALGORITHMS, SHARD, entries, poke, quantization
from fp8_support import (
    E4M3,
    PACKED,
    REPLACED,
    ROLES,
    UNPACKED,
    checkpoint_of,
    convert,
    fp8_refused,
    modelopt_cast,
    packed_modules,
    small_fp8_pair,
    two_weights,
    warnings_of,
)
from stage_support import with_record
from support import Tensors, copy, edit, load, same_bits, tree

from modelopt_convert.dialects.modelopt.export import UNSUPPORTED_ALGORITHMS
from modelopt_convert.formats.table import FORMATS

ALGORITHMS = OTHER_ALGORITHMS | {"NVFP4": "NVFP4 export"}
HINT = f"--keep-bf16 '{PACKED}'"


def test_every_unsupported_algorithm_has_a_case_here() -> None:
    formats = {one.quant_algo for one in FORMATS.values()} - {"FP8"}
    assert UNSUPPORTED_ALGORITHMS.keys() | formats == ALGORITHMS.keys()


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("algorithm", "why"), ALGORITHMS.items())
def test_other_algorithms_are_refused_by_name(
    algorithm: str, why: str, with_base: bool, fp8: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(fp8, tmp_path / "export", change_config=quantization(quant_algo=algorithm))
    names = (f"{export}/config.json", "quant_algo", "'FP8'", f"{algorithm!r}", why)
    beside = base if with_base else None
    fp8_refused(export, beside, tmp_path, code="export.quant_algo", names=names, hint="--format fp8")


@pytest.mark.parametrize("algorithm", ["FP8_V2", "fp8", "W4A8_FP8", "", None, 8, ["FP8"]])
def test_only_exactly_fp8_is_accepted(algorithm: Any, fp8: Path, base: Path, tmp_path: Path) -> None:
    export = edit(fp8, tmp_path / "export", change_config=quantization(quant_algo=algorithm))
    fp8_refused(export, base, tmp_path, code="export.quant_algo", names=("config.json", f"{algorithm!r} (unknown)"))


def test_a_real_nvfp4_export_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    fp8_refused(nvfp4, base, tmp_path, code="export.quant_algo", names=("'NVFP4'",), hint="")
    # Also where its config says FP8: other builders cast the packed codes.
    export = edit(nvfp4, tmp_path / "export", change_config=quantization(quant_algo="FP8"))
    for beside in (base, None):
        fp8_refused(export, beside, tmp_path, code="export.mixed", names=(SHARD, ".weight", "U8"))


def test_an_export_that_was_never_calibrated_is_refused(exports: Path, base: Path, tmp_path: Path) -> None:
    """ModelOpt packs the weights all the same and only leaves the input scales out; other builders exit 0 with all of
    its modules unquantized.
    """
    export = exports / "fp8_uncalibrated"
    assert len(packed_modules(load(export / "transformer"))) == 40
    for more in ((), ("--checkpoint", checkpoint_of(export))):
        for beside in (base, None):
            names = (str(export), " modules have no input_scale: ")
            fp8_refused(
                export,
                beside,
                tmp_path,
                *more,
                code="export.missing_input_scale",
                names=names,
                hint="never calibrated: leave out --export, or calibrate",
            )


@pytest.mark.parametrize("with_base", [True, False])
def test_an_export_with_nothing_packed_is_refused(with_base: bool, fp8: Path, base: Path, tmp_path: Path) -> None:
    plain = load(base / "transformer")

    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update(plain)

    export = edit(fp8, tmp_path / "export", change)
    beside = base if with_base else None
    fp8_refused(export, beside, tmp_path, code="export.nothing_quantized", names=(str(export),), hint="--checkpoint")


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), float("inf"), -0.001])
@pytest.mark.parametrize("role", ROLES)
def test_an_unusable_scale_is_refused_and_the_hint_helps(
    role: str, value: float, with_base: bool, fp8: Path, base: Path, tmp_path: Path
) -> None:
    name = f"{PACKED}.{role}"
    export = edit(fp8, tmp_path / "export", put(name, torch.tensor(value)))
    beside = base if with_base else None
    fp8_refused(
        export, beside, tmp_path, code="export.unusable_scale", names=(SHARD, name), hint=HINT if beside else ""
    )
    outcome = convert(export, base, tmp_path / "out", "--keep-bf16", PACKED)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["modules"][PACKED]["verdict"] == "not proven: replaced"
    assert same_bits(load(tmp_path / "out")[f"{PACKED}.weight"], load(base / "transformer")[f"{PACKED}.weight"])


def test_a_weight_scale_that_dequantizing_needs_is_not_excused_without_a_base(fp8: Path, tmp_path: Path) -> None:
    """Kept in BF16 by the preset, but its BF16 would be made from codes and this scale."""
    name = f"{REPLACED}.weight_scale"
    export = edit(fp8, tmp_path / "nan", put(name, torch.tensor(float("nan"))))
    fp8_refused(export, None, tmp_path, code="export.unusable_scale", names=(SHARD, name), hint="--base")
    export = edit(fp8, tmp_path / "none", lambda tensors: tensors.pop(name))
    fp8_refused(export, None, tmp_path, code="export.missing_weight_scale", names=(SHARD, name), hint="--base")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("role", ROLES)
def test_a_missing_scale_is_refused(role: str, more: tuple[str, ...], fp8: Path, base: Path, tmp_path: Path) -> None:
    name = f"{PACKED}.{role}"
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors.pop(name))
    fp8_refused(export, base, tmp_path, *more, code=f"export.missing_{role}", names=(SHARD, name), hint=HINT)


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_scale_is_excused_where_the_base_replaces(role: str, fp8: Path, base: Path, tmp_path: Path) -> None:
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors.pop(f"{REPLACED}.{role}"))
    outcome = convert(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["modules"][REPLACED]["verdict"] == "not proven: replaced"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (f"{PACKED}.weight_scale", torch.ones(160), "F32 [160]"),
        (f"{PACKED}.weight_scale", torch.ones(160, 1), "F32 [160, 1]"),
        (f"{PACKED}.weight_scale", torch.tensor(0.01, dtype=torch.bfloat16), "BF16 []"),
        (f"{PACKED}.weight_scale", torch.ones(160, 25, dtype=torch.uint8), "U8 [160, 25]"),
        (f"{PACKED}.input_scale", torch.tensor(0.01, dtype=torch.float64), "F64 []"),
        (f"{PACKED}.input_scale", torch.ones(2), "F32 [2]"),
    ],
)
def test_scales_of_another_dtype_or_shape_are_refused(
    name: str, value: torch.Tensor, found: str, fp8: Path, base: Path, tmp_path: Path
) -> None:
    """Per row, per block, or of another algorithm: the runtime takes one F32 number."""
    export = edit(fp8, tmp_path / "export", put(name, value))
    why = "scales are F32;" if value.ndim == 0 else "one scale per weight;"
    fp8_refused(export, base, tmp_path, code="export.shape", names=(SHARD, name, found), hint=why)


@pytest.mark.parametrize(
    ("role", "value", "code"),
    [
        ("weight", torch.zeros(160, 400, dtype=torch.uint8), "export.mixed"),
        ("weight", torch.zeros(160, 800, dtype=torch.int8), "export.mixed"),
        ("weight", torch.zeros(160, 800).to(torch.float8_e5m2), "export.mixed"),
        ("weight", torch.zeros(160, 800, dtype=torch.bfloat16), "export.weight"),
        ("weight", torch.zeros(128000).to(E4M3), "export.mixed"),
        ("weight_scale_2", torch.tensor(1.0), "export.mixed"),
        ("pre_quant_scale", torch.ones(800, dtype=torch.bfloat16), "export.transformed"),
        ("svdquant_lora_a", torch.ones(8, 800, dtype=torch.bfloat16), "export.transformed"),
    ],
)
def test_a_module_that_is_not_plain_fp8_is_refused(
    role: str, value: torch.Tensor, code: str, fp8: Path, base: Path, tmp_path: Path
) -> None:
    name = f"{PACKED}.{role}"
    export = edit(fp8, tmp_path / "export", put(name, value))
    fp8_refused(export, base, tmp_path, code=code, names=(SHARD, name))


def test_a_packed_weight_of_another_shape_than_the_bases_is_refused(fp8: Path, base: Path, tmp_path: Path) -> None:
    name = f"{PACKED}.weight"
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors.update({name: tensors[name][:, :-1]}))
    fp8_refused(export, base, tmp_path, code="export.shape", names=(name, "[160, 799]", "[160, 800]"))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(("module", "with_base"), [(PACKED, True), (PACKED, False), (REPLACED, False)])
@pytest.mark.parametrize("row", [0, 5, 37, 158])
def test_nan_codes_are_found_in_any_row(
    row: int, module: str, with_base: bool, code: int, fp8: Path, base: Path, tmp_path: Path
) -> None:
    """Sampled by the proof or not. Without a base, what is kept in BF16 is made from codes too."""
    name = f"{module}.weight"
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors.update({name: poke(tensors[name], row, 3, code)}))
    assert int(load(export)[name].float().isnan().sum()) == 1
    fp8_refused(export, base if with_base else None, tmp_path, code="export.not_finite", names=(SHARD, name))


def rolled_rows(tensors: Tensors) -> None:
    raw = tensors[f"{PACKED}.weight"].view(torch.uint8)
    tensors[f"{PACKED}.weight"] = raw.roll(1, dims=0).view(E4M3)


def zeroed_row(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"].view(torch.uint8)[0] = 0


def zeroed_column(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"].view(torch.uint8)[:, 7] = 0


def negated_row(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"].view(torch.uint8)[0] ^= 0x80


def scale_off(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale"] *= 1.05


def scale_halved(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale"] /= 2


def reciprocal_scale(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale"] = 1 / tensors[f"{PACKED}.weight_scale"]


def scale_of_another(tensors: Tensors) -> None:
    other = tensors["transformer_blocks.0.ff.net.0.proj.weight_scale"]
    assert not 0.95 < float(tensors[f"{PACKED}.weight_scale"] / other) < 1.05
    tensors[f"{PACKED}.weight_scale"] = other.clone()


DAMAGES = [
    rolled_rows,
    zeroed_row,
    zeroed_column,
    negated_row,
    scale_off,
    scale_halved,
    reciprocal_scale,
    scale_of_another,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_module_fails_the_check_and_is_named(
    damage: Callable[[Tensors], None], fp8: Path, base: Path, tmp_path: Path
) -> None:
    """--max-error cannot loosen what finds these."""
    export = edit(fp8, tmp_path / "export", damage)
    room = tmp_path / "room"
    room.mkdir()
    with_record(copy(fp8, room / "out"))
    before = entries(room)
    for more in ((), ("--max-error", "10")):
        outcome = convert(export, base, room / "out", "--overwrite", *more)
        assert (outcome.exit_code, outcome.error_code) == (1, "check.proof"), (damage, more, outcome.stderr)
        assert PACKED in outcome.message and "1 of 40" in outcome.message
        assert outcome.report is not None and outcome.report["proof"]["status"] == "fail"
        modules = outcome.report["proof"]["modules"]
        assert {name for name, module in modules.items() if module["verdict"] != "reproduced"} == {PACKED}
        # The output that was there is as it was.
        assert entries(room) == before


def test_weights_of_another_base_are_refused(fp8: Path, base: Path, tmp_path: Path) -> None:
    packed = {f"{module}.weight" for module in packed_modules(load(fp8 / "transformer"))}
    generator = torch.Generator().manual_seed(5)

    def replace(tensors: Tensors) -> None:
        for name in packed:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(torch.bfloat16)

    other = edit(base, tmp_path / "base", replace)
    fp8_refused(fp8, other, tmp_path, code="export.other_base", names=(str(fp8), "40 of 40"))


def test_unquantized_tensors_that_differ_tell_another_base(fp8: Path, base: Path, tmp_path: Path) -> None:
    other = edit(base, tmp_path / "base", lambda tensors: tensors[f"{UNPACKED}.bias"].add_(0.01))
    fp8_refused(fp8, other, tmp_path, code="export.other_base", names=(f"{UNPACKED}.bias",), hint="LoRA")


@pytest.mark.parametrize("with_base", [True, False])
def test_a_value_of_448_is_no_damage(with_base: bool, tmp_path: Path) -> None:
    """0x7E is the largest code, and the largest weight of each module has it."""
    export, base = small_fp8_pair(tmp_path / "made", two_weights(), {})
    codes = load(export)["lin.weight"].view(torch.uint8) & 0x7F
    assert int(codes.max()) == 0x7E
    outcome = convert(export, base if with_base else None, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0, outcome.stderr


def test_a_stale_scale_is_seen_although_its_codes_are_reproduced(tmp_path: Path) -> None:
    """Quantized with a scale eight times too small most of it saturates: the codes are what the base gives, useless."""
    weights = two_weights()
    scale = float(weights["lin"].abs().max()) / 448 / 8
    export, base = small_fp8_pair(tmp_path / "made", weights, {"lin": scale})
    assert same_bits(load(export)["lin.weight"], modelopt_cast(weights["lin"], torch.tensor(scale)))
    names = ("1 of 2", "lin")
    fp8_refused(export, base, tmp_path, code="check.proof", exit_code=1, names=names, preset="none")


@pytest.mark.parametrize(("factor", "error_code"), [(64.0, None), (1e6, "check.proof")])
def test_a_scale_under_which_all_codes_are_zero_proves_nothing(
    factor: float, error_code: str | None, tmp_path: Path
) -> None:
    """They are what the base gives under that scale; 64 times too large loses nothing of a weight in a float format."""
    weights = two_weights()
    scale = float(weights["lin"].abs().max()) / 448 * factor
    export, base = small_fp8_pair(tmp_path / "made", weights, {"lin": scale})
    codes = load(export)["lin.weight"]
    assert same_bits(codes, modelopt_cast(weights["lin"], torch.tensor(scale)))
    assert bool((codes.float() == 0).all()) is (error_code is not None)
    if error_code is not None:
        fp8_refused(export, base, tmp_path, code=error_code, exit_code=1, names=("1 of 2", "lin"), preset="none")
        return
    outcome = convert(export, base, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    module = outcome.report["proof"]["modules"]["lin"]
    assert (module["verdict"], module["scale_factor"]) == ("nearest", pytest.approx(factor))


def test_a_bias_that_differs_is_refused_or_accepted_and_kept(fp8: Path, base: Path, tmp_path: Path) -> None:
    name = f"{PACKED}.bias"
    far = edit(fp8, tmp_path / "far", lambda tensors: tensors[name].add_(0.5))
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors[name].mul_(1.01))
    for one in (far, export):
        fp8_refused(one, base, tmp_path, code="export.other_base", names=(SHARD, name), hint="--accept-near")
    outcome = convert(export, base, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    assert (proof["status"], proof["words"], proof["biases_differ"]) == ("not proven", "not proven: near", [PACKED])
    assert "export.biases_differ" in warnings_of(outcome)
    assert same_bits(load(tmp_path / "out")[name], load(export)[name])


@pytest.mark.parametrize("with_base", [True, False])
def test_a_dry_run_plans_and_writes_nothing(with_base: bool, fp8: Path, base: Path, tmp_path: Path) -> None:
    outcome = convert(fp8, base if with_base else None, tmp_path / "out", "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["status"] == "planned" and tree(tmp_path) == {}
    assert outcome.report["output"]["tensors"] > 100
