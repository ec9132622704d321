"""Scales that no kernel could use, which of them are excused, and scales that only look wrong."""

from pathlib import Path

import pytest
import torch
from faults import PACKED, REPLACED, SHARD, poke, quantize, refused, small_pair
from support import Tensors, build, edit, load, same_bits

HINT = f"--keep-bf16 '{PACKED}'"
GLOBAL_SCALES = ("weight_scale_2", "input_scale")
UNUSABLE = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -0.001)


def with_block_scale(source: Path, target: Path, module: str, byte: int) -> Path:
    """A copy whose very last block scale of one module, in a row that the proof samples, is this byte."""
    name = f"{module}.weight_scale"
    return edit(source, target, lambda tensors: tensors.update({name: poke(tensors[name], -1, -1, byte)}))


@pytest.mark.parametrize(
    ("byte", "found"),
    [
        (0x7F, "1 NaN of 8000"),
        (0xFF, "1 NaN of 8000"),
        (0xB8, "1 negative of 8000"),
        (0x81, "1 negative of 8000"),
        (0xFE, "1 negative of 8000"),
        (0x00, "1 zero that no underflow explains"),
        (0x80, "1 zero that no underflow explains"),
    ],
)
def test_an_unusable_block_scale_is_refused(byte: int, found: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export = with_block_scale(nvfp4, tmp_path / "export", PACKED, byte)
    rows, columns = load(export)[f"{PACKED}.weight_scale"].shape
    names = (SHARD, f"{PACKED}.weight_scale", f"{found}, first at [{rows - 1}, {columns - 1}]")
    refused(export, base, tmp_path, code="export.unusable_scale", names=names, hint=HINT)


@pytest.mark.parametrize("row", range(0, 160, 7))
def test_block_scales_are_checked_in_every_row(row: int, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """The codes are proven on a sample of the rows; finiteness is not a matter of sampling."""
    name = f"{PACKED}.weight_scale"
    byte = (0x7F, 0xB8, 0x00)[row % 3]
    export = edit(nvfp4, tmp_path / "x", lambda tensors: tensors.update({name: poke(tensors[name], row, 3, byte)}))
    refused(export, base, tmp_path, code="export.unusable_scale", names=(name, f"first at [{row}, 3]"), hint=HINT)


@pytest.mark.parametrize("value", UNUSABLE)
@pytest.mark.parametrize("role", GLOBAL_SCALES)
def test_an_unusable_global_scale_is_refused(role: str, value: float, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    name = f"{PACKED}.{role}"
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update({name: torch.tensor(value)}))
    names = (SHARD, name, "finite positive", f"found {value}")
    refused(export, base, tmp_path, code="export.unusable_scale", names=names, hint=HINT)


@pytest.mark.parametrize(
    ("role", "value"),
    [
        *((role, torch.tensor(value)) for role in GLOBAL_SCALES for value in (float("nan"), float("inf"), 0.0, -1.0)),
        *(("weight_scale", torch.tensor(byte, dtype=torch.uint8)) for byte in (0x7F, 0xB8, 0x00)),
    ],
)
def test_unusable_scales_are_excused_where_the_preset_replaces(
    role: str, value: torch.Tensor, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    name = f"{REPLACED}.{role}"

    def change(tensors: Tensors) -> None:
        if role == "weight_scale":
            tensors[name] = poke(tensors[name], 0, 0, int(value))
        else:
            tensors[name] = value

    export = edit(nvfp4, tmp_path / "export", change)
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    found = outcome.report["proof"]["modules"][REPLACED]
    assert found["verdict"] == "not proven: replaced" and name in found["reason"]
    out = load(tmp_path / "out")
    assert same_bits(out[f"{REPLACED}.weight"], load(base / "transformer")[f"{REPLACED}.weight"])
    assert name not in out


def test_an_all_zero_layer_is_refused_and_the_hint_helps(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    packed = quantize(PACKED, torch.zeros(160, 800, dtype=torch.bfloat16))
    # What ModelOpt makes of it: NaN under a global scale of zero.
    assert float(packed[f"{PACKED}.weight_scale_2"]) == 0.0
    assert bool(packed[f"{PACKED}.weight_scale"].isnan().all())
    assert set(packed[f"{PACKED}.weight"].flatten().tolist()) == {0x77}
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update(packed))
    zero = edit(base, tmp_path / "base", lambda tensors: tensors[f"{PACKED}.weight"].zero_())
    refused(export, zero, tmp_path, code="export.unusable_scale", names=(SHARD, PACKED), hint=HINT)
    outcome = build(export, zero, tmp_path / "out", "--keep-bf16", PACKED)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["modules"][PACKED]["verdict"] == "not proven: replaced"
    weight = load(tmp_path / "out")[f"{PACKED}.weight"]
    assert weight.dtype == torch.bfloat16 and not bool(weight.any())


def test_a_layer_never_calibrated_is_refused(exports: Path, base: Path, tmp_path: Path) -> None:
    """A real export without a forward loop: ModelOpt writes no input_scale and no warning."""
    export = exports / "nvfp4_uncalibrated"
    names = ("nvfp4_uncalibrated", "24 of 24 modules", "input_scale")
    refused(export, base, tmp_path, code="export.missing_input_scale", names=names, hint="calibrate")


@pytest.mark.parametrize("row", [0, 4, 77, 159])
def test_a_zero_scale_that_underflow_explains_passes(row: int, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """As ModelOpt up to 0.44 wrote blocks far below the largest: scale 0, and codes of weight / 0."""
    block = slice(16 * 11, 16 * 12)

    def shrink(tensors: Tensors) -> None:
        values = tensors[f"{PACKED}.weight"][row, block]
        values *= 1e-7
        values[3] = 0.0

    tiny = edit(base, tmp_path / "base", shrink)
    weight = load(tiny)[f"{PACKED}.weight"][row, block].float()
    codes = torch.where(weight < 0, 15, 7)  # 0 / 0 is NaN, which ModelOpt's search puts last: 7 too
    assert {7, 15} == set(codes.tolist())

    def underflow(tensors: Tensors) -> None:
        tensors[f"{PACKED}.weight"][row, 8 * 11 : 8 * 12] = (codes[0::2] + 16 * codes[1::2]).to(torch.uint8)
        tensors[f"{PACKED}.weight_scale"] = poke(tensors[f"{PACKED}.weight_scale"], row, 11, 0x00)

    export = edit(nvfp4, tmp_path / "export", underflow)
    outcome = build(export, tiny, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["modules"][PACKED]["verdict"] == "reproduced"
    # The same zero over the base as it was is not explained.
    (tmp_path / "again").mkdir()
    names = (SHARD, f"{PACKED}.weight_scale", "1 zero that no underflow explains")
    refused(export, base, tmp_path / "again", code="export.unusable_scale", names=names)


@pytest.mark.parametrize(("largest", "explained"), [(5.0, True), (6.0, True), (6.03125, False), (9.0, False)])
def test_underflow_ends_where_e4m3_rounding_ends(largest: float, explained: bool, tmp_path: Path) -> None:
    """A scale of 2^-10 is half of the smallest E4M3 value and rounds to zero; what is above rounds up to it."""
    scale_2 = 2.0**-7
    expected = torch.tensor(largest * 2.0**-17 / (6 * scale_2)).to(torch.float8_e4m3fn)
    assert (float(expected) == 0.0) is explained
    export, base = small_pair(tmp_path / "made", {"lin": (32, 64), "other": (32, 64)})

    def shrink(tensors: Tensors) -> None:
        tensors["lin.weight"][0, 0] = 2688 * scale_2  # the largest, so that max calibration gives this scale
        tensors["lin.weight"][5, 16:32] = largest * 2.0**-17

    def underflow(tensors: Tensors) -> None:
        tensors |= quantize("lin", load(base)["lin.weight"])
        assert float(tensors["lin.weight_scale_2"]) == scale_2
        tensors["lin.weight"][5, 8:16] = 0x77
        tensors["lin.weight_scale"] = poke(tensors["lin.weight_scale"], 5, 1, 0x00)

    base = edit(base, tmp_path / "base", shrink)
    export = edit(export, tmp_path / "export", underflow)
    if explained:
        outcome = build(export, base, tmp_path / "out", preset="none")
        assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
        assert outcome.report["proof"]["counts"] == {"reproduced": 2}
    else:
        names = ("lin.weight_scale", "1 zero")
        refused(export, base, tmp_path, code="export.unusable_scale", names=names, preset="none")


@pytest.mark.parametrize(
    ("parent", "leaves"),
    [
        ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
        ("transformer_blocks.1.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ],
)
def test_global_scales_that_differ_inside_a_fused_group_are_reported(
    parent: str, leaves: tuple[str, ...], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """SGLang brings them to one scale on loading, so they pass."""
    weights = load(base / "transformer")
    exported = load(nvfp4 / "transformer")
    # Re-quantized alone, the member with the smallest weights gets a scale smaller than the group's.
    member = min((f"{parent}.{leaf}" for leaf in leaves), key=lambda name: float(weights[f"{name}.weight"].abs().max()))
    alone = quantize(member, weights[f"{member}.weight"])
    ratio = float(exported[f"{member}.weight_scale_2"] / alone[f"{member}.weight_scale_2"])
    assert ratio > 1.0
    alone[f"{member}.input_scale"] = exported[f"{member}.input_scale"]
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update(alone))
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    group = ", ".join(f"{parent}.{leaf}" for leaf in leaves)
    assert outcome.report["proof"]["fused_scales_differ"] == {group: pytest.approx(ratio)}
    assert outcome.report["proof"]["counts"] == {"reproduced": 24, "reproduced (sampled rows)": 16}
    warnings = [one["message"] for one in outcome.report["warnings"] if one["code"] == "export.fused_scales"]
    assert len(warnings) == 1 and group in warnings[0]
    assert group in outcome.stderr
    out = load(tmp_path / "out")
    assert all(same_bits(out[name], tensor) for name, tensor in alone.items())


def test_equal_global_scales_inside_a_fused_group_are_not_reported(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    outcome = build(nvfp4, base, tmp_path / "out")
    assert outcome.report is not None and outcome.exit_code == 0
    assert outcome.report["proof"]["fused_scales_differ"] == {}
    assert outcome.report["warnings"] == []
