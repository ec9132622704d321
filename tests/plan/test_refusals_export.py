"""Exports that build-nvfp4 refuses for what their config.json, names, dtypes and shapes say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import OTHER_ALGORITHMS, PACKED, REPLACED, SHARD, poke, quantization, refused, small_pair, swizzle
from support import Tensors, build, edit, load, same_bits

from modelopt_convert.dialects.modelopt.export import UNSUPPORTED_ALGORITHMS
from modelopt_convert.formats.table import FORMATS

ALGORITHMS = OTHER_ALGORITHMS | {"FP8": "FP8 export"}
ROLES = ("weight_scale", "weight_scale_2", "input_scale")


def test_every_unsupported_algorithm_has_a_case_here() -> None:
    formats = {one.quant_algo for one in FORMATS.values()} - {"NVFP4"}
    assert UNSUPPORTED_ALGORITHMS.keys() | formats == ALGORITHMS.keys()


@pytest.mark.parametrize(("algorithm", "why"), ALGORITHMS.items())
def test_other_algorithms_are_refused_by_name(
    algorithm: str, why: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", change_config=quantization(quant_algo=algorithm))
    names = (f"{export}/config.json", "quant_algo", "'NVFP4'", f"{algorithm!r}", why)
    hint = f"run `mopt convert-fp8 --export {export} --base {base}" if algorithm == "FP8" else "--format fp4"
    refused(export, base, tmp_path, code="export.quant_algo", names=names, hint=hint)


@pytest.mark.parametrize("algorithm", ["NVFP4_V2", "nvfp4", "FP4", "", None, 4, ["NVFP4"]])
def test_only_exactly_nvfp4_is_accepted(algorithm: Any, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """A substring test, as other builders have it, lets W4A8_NVFP4_FP8 in."""
    export = edit(nvfp4, tmp_path / "export", change_config=quantization(quant_algo=algorithm))
    refused(export, base, tmp_path, code="export.quant_algo", names=("config.json", f"{algorithm!r} (unknown)"))


def test_missing_quant_algo_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]["quant_algo"]

    export = edit(nvfp4, tmp_path / "export", change_config=forget)
    refused(export, base, tmp_path, code="export.quant_algo", names=("config.json", "None"))


@pytest.mark.parametrize("found", ["absent", None, [], "NVFP4"])
def test_export_without_quantization_config_is_refused(found: Any, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]
        if found != "absent":
            config["quantization_config"] = found

    export = edit(nvfp4, tmp_path / "export", change_config=forget)
    refused(export, base, tmp_path, code="export.not_quantized", names=("config.json", "quantization_config"))


def test_what_declares_another_dialect_than_its_tensors_are_of_is_refused(
    nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", change_config=quantization(quant_method="compressed-tensors"))
    refused(export, base, tmp_path, code="dialect.contradiction", names=("weight_global_scale", "weight_scale_2"))


@pytest.mark.parametrize("method", ["bitsandbytes", "MODELOPT", None])
def test_other_quant_methods_are_refused(method: Any, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export = edit(nvfp4, tmp_path / "export", change_config=quantization(quant_method=method))
    refused(export, base, tmp_path, code="export.quant_method", names=("config.json", "quant_method", repr(method)))


@pytest.mark.parametrize("size", [32, 8, "16", None])
def test_other_group_sizes_are_refused(size: Any, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = size

    export = edit(nvfp4, tmp_path / "export", change_config=change)
    refused(export, base, tmp_path, code="export.group_size", names=("config.json", "16", repr(size)))


@pytest.mark.parametrize("module", [PACKED, REPLACED, "x_embedder"])
@pytest.mark.parametrize("role", ["pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"])
def test_what_awq_and_svdquant_leave_is_refused(
    role: str, module: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Also where the preset replaces the module: the other weights of such an export are changed too."""
    name = f"{module}.{role}"
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update({name: torch.ones(4)}))
    names = (SHARD, name, "SVDQuant")
    refused(export, base, tmp_path, code="export.transformed", names=names, hint="--quant-algo max")


@pytest.mark.parametrize("module", [PACKED, REPLACED])
def test_an_fp8_weight_among_nvfp4_modules_is_refused(module: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    weight = load(base / "transformer")[f"{module}.weight"]

    def change(tensors: Tensors) -> None:
        del tensors[f"{module}.weight_scale_2"]
        tensors[f"{module}.weight"] = (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = weight.abs().max().float() / 448

    export = edit(nvfp4, tmp_path / "export", change)
    refused(export, base, tmp_path, code="export.mixed", names=(SHARD, f"{module}.weight", "F8_E4M3"))


@pytest.mark.parametrize(
    ("found", "change"),
    [
        ("no weight", lambda tensors: tensors.pop(f"{PACKED}.weight")),
        ("BF16", lambda tensors: tensors.update({f"{PACKED}.weight": torch.zeros(160, 800, dtype=torch.bfloat16)})),
        ("I8", lambda tensors: tensors.update({f"{PACKED}.weight": tensors[f"{PACKED}.weight"].view(torch.int8)})),
        ("U8 [64000]", lambda tensors: tensors.update({f"{PACKED}.weight": tensors[f"{PACKED}.weight"].flatten()})),
    ],
)
def test_scales_beside_no_packed_weight_are_refused(
    found: str, change: Callable[[Tensors], object], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", change)
    refused(export, base, tmp_path, code="export.weight", names=(SHARD, f"{PACKED}.weight", found))


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_scale_is_refused_and_the_hint_helps(role: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """SGLang fills a missing scale with ones and says nothing."""
    name = f"{PACKED}.{role}"
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.pop(name))
    hint = f"--keep-bf16 '{PACKED}'"
    refused(export, base, tmp_path, code=f"export.missing_{role}", names=(SHARD, name), hint=hint)
    outcome = build(export, base, tmp_path / "out", "--keep-bf16", PACKED)
    assert outcome.exit_code == 0, outcome.stderr
    assert same_bits(load(tmp_path / "out")[f"{PACKED}.weight"], load(base / "transformer")[f"{PACKED}.weight"])


@pytest.mark.parametrize("role", ROLES)
def test_a_dry_run_refuses_a_missing_scale_too(role: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """It reads headers only; they tell."""
    name = f"{PACKED}.{role}"
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.pop(name))
    refused(export, base, tmp_path, "--dry-run", code=f"export.missing_{role}", names=(SHARD, name))


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_scale_is_excused_where_the_preset_replaces(
    role: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    name = f"{REPLACED}.{role}"
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.pop(name))
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    found = outcome.report["proof"]["modules"][REPLACED]
    assert found["verdict"] == "not proven: replaced" and name in found["reason"]
    counts = {"not proven: replaced": 1, "reproduced": 24, "reproduced (sampled rows)": 15}
    assert outcome.report["proof"]["counts"] == counts
    out = load(tmp_path / "out")
    assert same_bits(out[f"{REPLACED}.weight"], load(base / "transformer")[f"{REPLACED}.weight"])
    assert not [name for name in out if name.startswith(REPLACED) and "scale" in name]


def cut(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{PACKED}.{role}": change(tensors[f"{PACKED}.{role}"])})


@pytest.mark.parametrize(
    ("role", "change", "found"),
    [
        ("weight_scale", lambda scale: scale[:, :-1], "F8_E4M3 [160, 49]"),
        ("weight_scale", lambda scale: scale[:-1], "F8_E4M3 [159, 50]"),
        ("weight_scale", lambda scale: scale.T, "F8_E4M3 [50, 160]"),
        ("weight_scale", lambda scale: scale.flatten(), "F8_E4M3 [8000]"),
        ("weight_scale", lambda scale: scale[:, ::2], "F8_E4M3 [160, 25] (blocks of 32)"),
        ("weight_scale", lambda scale: scale.float(), "F32 [160, 50]"),
        ("weight_scale", lambda scale: scale.view(torch.uint8), "U8 [160, 50]"),
        ("weight_scale_2", lambda scale: scale.view(1, 1), "F32 [1, 1]"),
        ("weight_scale_2", lambda scale: scale.to(torch.bfloat16), "BF16 []"),
        ("input_scale", lambda scale: scale.expand(800), "F32 [800]"),
    ],
)
def test_shape_algebra_that_does_not_hold_is_refused(
    role: str, change: Callable[[torch.Tensor], torch.Tensor], found: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", cut(role, change))
    refused(export, base, tmp_path, code="export.shape", names=(SHARD, f"{PACKED}.{role}", found))


def test_swizzled_scales_with_padding_are_put_in_order(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """As after ModelOpt's enable_swizzle_layout: [160, 50] becomes [256, 52]."""
    export = edit(nvfp4, tmp_path / "export", cut("weight_scale", swizzle))
    assert load(export)[f"{PACKED}.weight_scale"].shape == (256, 52)
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert [one["code"] for one in outcome.report["warnings"]] == ["export.layout"]
    name = f"{PACKED}.weight_scale"
    assert same_bits(load(tmp_path / "out")[name], load(nvfp4 / "transformer")[name])


def test_scales_in_the_padding_are_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """[160, 50] scales in a [256, 52] tensor: what would be cut must be zero."""
    export = edit(nvfp4, tmp_path / "export", cut("weight_scale", lambda scale: poke(swizzle(scale), -1, -1, 0x38)))
    refused(export, base, tmp_path, code="export.padding", names=(SHARD, f"{PACKED}.weight_scale"))


def test_a_weight_that_is_no_whole_number_of_blocks_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Base and export are cut alike, so that only the algebra within the export is wrong."""
    export = edit(nvfp4, tmp_path / "export", cut("weight", lambda weight: weight[:, :-1]))
    narrow = edit(base, tmp_path / "base", cut("weight", lambda weight: weight[:, :-2]))
    refused(export, narrow, tmp_path, code="export.shape", names=(SHARD, f"{PACKED}.weight", "K = 798"))


def test_a_weight_narrower_than_the_bases_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export = edit(nvfp4, tmp_path / "export", cut("weight", lambda weight: weight[:, :-1]))
    refused(export, base, tmp_path, code="export.shape", names=(f"{PACKED}.weight", "[160, 798]", "[160, 800]"))


@pytest.mark.parametrize(("row", "code"), [(45, "export.padding"), (None, None)])
def test_rows_padded_to_16_must_be_padded_with_zeros(row: int | None, code: str | None, tmp_path: Path) -> None:
    """What ModelOpt's padding_strategy does to a layer of 40 rows; here the base was cut instead."""
    whole, whole_base = small_pair(tmp_path / "made", {"lin": (48, 64), "other": (32, 64)})

    def clear_padding(tensors: Tensors) -> None:
        tensors["lin.weight"][40:] = 0
        tensors["lin.weight_scale"].view(torch.uint8)[40:] = 0
        if row is not None:
            tensors["lin.weight"][row, 0] = 1

    def cut_rows(tensors: Tensors) -> None:
        tensors["lin.weight"] = tensors["lin.weight"][:40]

    export = edit(whole, tmp_path / "export", clear_padding)
    base = edit(whole_base, tmp_path / "base", cut_rows)
    if code is not None:
        refused(export, base, tmp_path, code=code, names=(SHARD, "lin.weight"), preset="none")
        return
    outcome = build(export, base, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0, outcome.stderr
    assert load(tmp_path / "out")["lin.weight"].shape == (40, 32)


def test_an_export_with_nothing_packed_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """As ModelOpt leaves it if quantization was never switched on: a config that promises NVFP4 over BF16 tensors."""
    plain = load(base / "transformer")

    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update(plain)

    export = edit(nvfp4, tmp_path / "export", change)
    refused(export, base, tmp_path, code="export.nothing_quantized", names=(str(export), "U8"))


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.norm1.norm.input_quantizer._amax",  # ModelOpt 0.44 and 0.45 leak this one
        f"{PACKED}.weight_quantizer.weight_scale",
        "x_embedder.input_quantizer.input_scale",
    ],
)
def test_leaked_calibration_state_is_no_scale(name: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Whatever its name ends in: it neither makes a module packed nor comes into the output."""
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update({name: torch.ones(())}))
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["ledger"]["export"][name] == "dropped: calibration state"
    assert name not in load(tmp_path / "out")
