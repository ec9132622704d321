"""The judgement on one NVFP4 module on disk: what ModelOpt packs is proven, every planted fault is seen."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import swap, swizzle
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_support import MAX_ERROR, NAME, judged, judged_as_stored, together
from producers import (
    Packed,
    compressed_group,
    dequantized,
    four_over_six,
    fused_group,
    larger_global_scale,
    max_calibration,
    mse_sweep,
    own_global_scale,
    signed_zeros,
    ten_scales,
    ties_away,
)
from torch import Tensor
from weights import weight

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.layout import CANONICAL, Layout
from modelopt_convert.formats.rows import sample_rows
from modelopt_convert.proof.closeness import Closeness
from modelopt_convert.proof.export import Proof, concluded
from modelopt_convert.proof.judgement import (
    COMPRESSED,
    Counts,
    Judgement,
    format_proof,
    scale_words,
    with_shared_scales,
)
from modelopt_convert.run.errors import Faults, InputError


@dataclass
class Module:
    """A weight and what ModelOpt made of it (or of a neighbour of it)."""

    base: Tensor
    packed: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def made(self) -> Packed:
        return Packed(self.packed, self.scale, self.global_scale)


def module(seed: int = 0, shape: tuple[int, int] = (256, 256), noise: float = 0.0) -> Module:
    """A DiT-like weight packed by ModelOpt; with noise, a slightly different weight is packed, as by QAT."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(shape[1], generator=generator).pow(3) * 4 + 0.5
    base = (torch.randn(shape, generator=generator) * columns * 0.02).to(torch.bfloat16)
    trained = base.float() * (1 + noise * torch.randn(shape, generator=generator))
    oracle, scale, global_scale = NVFP4QTensor.quantize(trained.to(torch.bfloat16), 16)
    return Module(base, oracle._quantized_data, scale, global_scale)


@pytest.mark.parametrize("shape", [(1, 16), (16, 32), (100, 48), (128, 64), (1000, 160)])
def test_what_modelopt_packed_is_reproduced(shape: tuple[int, int], tmp_path: Path) -> None:
    one = module(shape=shape)
    verdict = judged(tmp_path, one.base, one.made)
    assert verdict.verdict == "reproduced" and verdict.is_whole and verdict.first is None
    assert verdict.counts == Counts(one.base.numel(), one.base.numel(), scales=(n := one.scale.numel()), scales_equal=n)
    assert (verdict.rule, verdict.cast, verdict.reading) == ("max calibration", "BF16", CANONICAL)
    assert (verdict.amax, verdict.scale) == (float(one.base.abs().max()), float(one.global_scale))
    assert together("nvfp4", {NAME: verdict}) == {NAME: "reproduced"}


def test_a_trained_neighbour_is_near(tmp_path: Path) -> None:
    one = module(noise=0.02)
    verdict = judged(tmp_path, one.base, one.made)
    assert verdict.verdict == "near" and not verdict.passed and verdict.counts.codes_equal < verdict.counts.codes
    assert verdict.closeness is not None and 0.05 < verdict.closeness.relative_error < 0.12
    assert verdict.rule is None and verdict.first is not None
    # The limit decides, of the whole and of every strip of 128 rows.
    error = verdict.closeness.relative_error
    assert judged(tmp_path, one.base, one.made, max_error=error * 0.99).verdict == "mismatch"
    strips = (one.base[:128], one.base[128:])
    worst = max(
        float((stored - base.double()).norm() / base.double().norm())
        for base, stored in zip(strips, dequantized(one.made).split(128), strict=True)
    )
    assert worst > error
    assert judged(tmp_path, one.base, one.made, max_error=(worst + error) / 2).verdict == "mismatch"
    assert judged(tmp_path, one.base, one.made, max_error=worst * 1.001).verdict == "near"


def _swap(one: Module) -> None:
    one.packed = swap(one.packed)


def _swizzle(one: Module) -> None:
    one.scale = swizzle(one.scale)


def _both(one: Module) -> None:
    _swap(one)
    _swizzle(one)


def _reciprocal(one: Module) -> None:
    one.global_scale = 1.0 / one.global_scale


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    ("plant", "reading"),
    [
        (lambda one: None, Layout("low", "linear", "multiply")),
        (_swap, Layout("high", "linear", "multiply")),
        (_swizzle, Layout("low", "128x4", "multiply")),
        (_both, Layout("high", "128x4", "multiply")),
        (_reciprocal, Layout("low", "linear", "divide")),
    ],
)
def test_another_layout_is_found(
    plant: Callable[[Module], None], reading: Layout, noise: float, tmp_path: Path
) -> None:
    one = module(noise=noise)
    plant(one)
    verdict = judged(tmp_path, one.base, one.made)
    assert verdict.reading == reading
    assert verdict.verdict == ("near" if noise else "reproduced")


@pytest.mark.parametrize("plant", [_swap, _swizzle])
def test_a_module_that_lies_in_two_ways_is_refused(plant: Callable[[Module], None], tmp_path: Path) -> None:
    """Half of it in each: every tile fits some reading, and none fits all."""
    one, other = module(), module()
    plant(other)
    one.packed[128:], one.scale.view(torch.uint8)[128:] = other.packed[128:], other.scale.view(torch.uint8)[128:]
    assert judged(tmp_path, one.base, one.made).verdict in ("mismatch", "unrelated")


def _global_scale_5_percent(one: Module) -> None:
    one.global_scale = one.global_scale * 1.05


def _zero_scale_row(one: Module) -> None:
    one.scale.view(torch.uint8)[sample_rows(len(one.base), 16)[3]] = 0


def _two_columns_dropped(one: Module) -> None:
    one.packed[:, -1] = 0


def _tail_rows_zero(one: Module) -> None:
    one.packed[-1:] = 0


def _hidden_row_zero(one: Module) -> None:
    one.packed[sample_rows(len(one.base), 16)[3] + 1] = 0


def _scales_one_row_off(one: Module) -> None:
    one.scale = one.scale.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)


def _scales_one_column_off(one: Module) -> None:
    one.scale = one.scale.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)


def _block_dropped(one: Module) -> None:
    one.packed[:, :8] = 0


FAULTS = [
    _global_scale_5_percent,
    _zero_scale_row,
    _two_columns_dropped,
    _tail_rows_zero,
    _hidden_row_zero,
    _scales_one_row_off,
    _scales_one_column_off,
    _block_dropped,
]


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("plant", FAULTS, ids=lambda function: function.__name__)
def test_a_fault_without_a_name_is_a_mismatch(plant: Callable[[Module], None], noise: float, tmp_path: Path) -> None:
    one = module(noise=noise)
    plant(one)
    assert judged(tmp_path, one.base, one.made).verdict == "mismatch"


def _one_bit(one: Module) -> None:
    one.packed[77, 100] ^= 0x10


def _one_sign(one: Module) -> None:
    one.packed[77, 100] ^= 0x80


def _one_scale_by_one_step(one: Module) -> None:
    one.scale.view(torch.uint8)[77, 9] += 1


@pytest.mark.parametrize("plant", [_one_bit, _one_sign, _one_scale_by_one_step])
def test_a_single_byte_is_a_mismatch_where_all_else_is_reproduced(
    plant: Callable[[Module], None], tmp_path: Path
) -> None:
    """And is named. A search or other weights would change more than a few blocks."""
    one = module()
    plant(one)
    verdict = judged(tmp_path, one.base, one.made)
    assert verdict.verdict == "mismatch" and verdict.first is not None and verdict.first.startswith("row 77, column")


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_rows_permuted_or_another_base_are_unrelated(noise: float, tmp_path: Path) -> None:
    one = module(noise=noise)
    one.base = one.base[torch.randperm(len(one.base), generator=torch.Generator().manual_seed(1))]
    assert judged(tmp_path, one.base, one.made).verdict == "unrelated"
    other = module(noise=noise)
    assert judged(tmp_path, module(seed=5).base, other.made).verdict == "unrelated"


def test_a_column_that_the_format_loses_is_not_held_against_the_export(tmp_path: Path) -> None:
    """Measured on a real ``mtq.compress`` export: a right module had a column 0.73 off, beside outliers."""
    one = module(noise=0.02)
    one.base[:, 1] = one.base[:, 1] * 0.01  # far below its block's amax: every quantizer rounds it to zero
    one.packed[:, 0] &= 0x0F
    assert judged(tmp_path, one.base, one.made).verdict == "near"
    # The same column at its full size, dropped, is a fault.
    full = module(noise=0.02)
    full.packed[:, 0] &= 0x0F
    assert judged(tmp_path, full.base, full.made).verdict == "mismatch"


def test_nan_is_never_within_limits() -> None:
    good = Closeness(0.1, 1.0, 0.1, 0.1, 1.0)
    assert good.within(MAX_ERROR)
    for field in ("relative_error", "gain", "worst_row", "worst_column"):
        assert not dataclasses.replace(good, **{field: float("nan")}).within(MAX_ERROR)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_are_reproduced_not_misjudged(value: float, tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    base = torch.full((64, 64), value, dtype=torch.bfloat16)
    scale_of_one = torch.tensor(1.0 / 2688)
    oracle, scale, global_scale = NVFP4QTensor.quantize(base, 16, weights_scaling_factor_2=scale_of_one)
    assert judged(tmp_path, base, Packed(oracle._quantized_data, scale, global_scale)).verdict == "reproduced"


def test_one_value_more_than_the_global_scale_holds_is_no_proof(tmp_path: Path) -> None:
    """All codes are the nearest, and no scale could be better: the global scale is at fault."""
    base = weight("gaussian", 128, 256, 0, torch.float32)
    for factor, verdicts in ((0.8, ("mismatch", "near")), (0.99, ("mismatch", "near")), (1.0, ("reproduced",))):
        one = max_calibration(base, own_global_scale(base) * factor)
        assert judged(tmp_path, base, one).verdict in verdicts, factor


def test_searched_scales_are_nearest(tmp_path: Path) -> None:
    base = weight("outlier_channels", 128, 256, 0)
    verdict = judged(tmp_path, base, four_over_six(base))
    assert verdict.verdict == "nearest" and verdict.rule == "nearest codes under searched scales" and verdict.passed
    # A rounded scale is one thing, a code that is not the nearest another.
    one = four_over_six(base)
    one.packed[5, 5] ^= 0x10
    verdict = judged(tmp_path, base, one)
    assert verdict.verdict == "near" and verdict.first is not None


@pytest.mark.parametrize("layout", [CANONICAL, Layout("high", "128x4")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mopts_own_sweep_is_nearest_byte_for_byte(layout: Layout, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the layout and the dtype of the base; one scale that is another, and it is another search at best."""
    base = weight("outlier_channels", 128, 256, 0).to(dtype) * (1 if dtype == torch.bfloat16 else 1.003)
    one = ten_scales(base.bfloat16())

    def verdict(name: str) -> Judgement:
        packed = swap(one.packed) if layout.nibbles == "high" else one.packed
        scale = swizzle(one.scale) if layout.scales == "128x4" else one.scale
        return judged_as_stored(tmp_path / name, base, Packed(packed, scale, one.global_scale), ("BF16", "F16"))

    found = verdict("swept")
    assert (found.verdict, found.rule, found.cast) == ("nearest", "a sweep of block scales", "BF16")
    assert found.reading == layout
    assert found.counts.codes_equal == found.counts.codes and found.first is None
    assert found.counts.scales_equal < found.counts.scales == 128 * 16 and found.counts.blocks_above == 0
    one.scale.view(torch.uint8)[5, 3] += 1
    assert verdict("scale").rule != "a sweep of block scales"
    one.scale.view(torch.uint8)[5, 3] -= 1
    one.packed[7, 7] ^= 0x10
    assert verdict("code").verdict == "near"


def test_a_sweep_under_a_scale_that_bf16_does_not_reach_is_no_proof(tmp_path: Path) -> None:
    """Of a base that was loaded in F16: its own cast explains the export, and rounding to BF16 clips it."""
    base = torch.full((31, 16), 0.02)
    base[0, 0] = 0.03001
    one = ten_scales(base.half())
    assert float(base.bfloat16().max()) > float(one.global_scale) * 6 * 448
    found = judged(tmp_path, base, one, casts=("F16", "BF16"))
    assert (found.verdict, found.cast) == ("nearest", "F16") and found.rule != "a sweep of block scales"


def test_a_sweep_that_changes_a_few_blocks_is_no_damage(tmp_path: Path) -> None:
    """Where nothing improves a block its scale is max calibration's: here in all but a few, which look like damage."""
    base = torch.zeros(128, 256, dtype=torch.bfloat16)
    base[0, :64] = weight("gaussian", 1, 64, 0)[0]
    one = ten_scales(base)
    changed = (one.scale.view(torch.uint8) != max_calibration(base).scale.view(torch.uint8)).sum()
    assert 0 < int(changed) < 0.01 * one.scale.numel()
    found = judged(tmp_path, base, one)
    assert (found.verdict, found.rule) == ("nearest", "a sweep of block scales")


def test_a_few_searched_blocks_are_damage(tmp_path: Path) -> None:
    """Each is better than that of max calibration; but a search changes blocks all over a weight."""
    base = weight("outlier_channels", 128, 256, 0)
    common, other = max_calibration(base), mse_sweep(base)
    better = (common.scale.view(torch.uint8) != other.scale.view(torch.uint8)).nonzero()
    row, column = (int(one) for one in better[0])
    common.packed[row, 8 * column : 8 * column + 8] = other.packed[row, 8 * column : 8 * column + 8]
    common.scale.view(torch.uint8)[row, column] = other.scale.view(torch.uint8)[row, column]
    verdict = judged(tmp_path, base, common)
    assert verdict.verdict == "mismatch" and verdict.counts.blocks_above == 0
    assert verdict.first is not None and verdict.first.startswith(f"row {row}, columns {16 * column} to")


@pytest.mark.parametrize("make", [ties_away, signed_zeros])
def test_other_rounding_of_ties_is_told_from_the_same(make: Callable[[Tensor], Packed], tmp_path: Path) -> None:
    base = weight("many_ties", 128, 256, 0)
    verdict = judged(tmp_path, base, make(base))
    assert verdict.verdict == "reproduced but for ties" and verdict.passed and verdict.rule == "max calibration"
    counts = verdict.counts
    assert counts.codes_tied + counts.zero_signs == counts.codes - counts.codes_equal > 0
    assert together("nvfp4", {NAME: verdict}) == {NAME: "reproduced but for ties"}


@pytest.mark.parametrize("through", ["F16", "BF16"])
def test_the_cast_that_holds_is_named(through: str, tmp_path: Path) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[through]
    base = weight("tiny", 32, 64, 0, torch.float32)
    made = max_calibration(base.to(dtype))
    verdict = judged(tmp_path, base, made, casts=("F32", "F16", "BF16"))
    assert (verdict.verdict, verdict.cast) == ("reproduced", through)
    other = {"F16": "BF16", "BF16": "F16"}[through]
    assert judged(tmp_path, base, made, casts=("F32", other)).verdict not in ("reproduced", "reproduced but for ties")


# All modules together


def test_a_fused_group_shares_the_scale_of_its_largest(tmp_path: Path) -> None:
    group = [weight("gaussian", 32, 64, seed) * factor for seed, factor in enumerate((1, 0.3, 2.5))]
    found = {
        str(number): judged(tmp_path, base, made)
        for number, (base, made) in enumerate(zip(group, fused_group(group), strict=True))
    }
    assert set(together("nvfp4", found).values()) == {"reproduced"}
    # Without the largest, nothing says that the scale is one of max calibration.
    del found["2"]
    assert set(together("nvfp4", found).values()) == {"nearest"}


def test_a_compressed_group_is_reproduced_beside_its_largest(tmp_path: Path) -> None:
    group = [weight("gaussian", 32, 64, seed) * factor for seed, factor in enumerate((1, 0.3, 2.5))]
    made = compressed_group(group)
    found = {str(number): judged(tmp_path, *pair) for number, pair in enumerate(zip(group, made, strict=True))}
    assert [one.rule for one in found.values()] == [COMPRESSED, COMPRESSED, "max calibration"]
    assert set(together("nvfp4", found).values()) == {"reproduced"}
    # By itself the rule explains nothing: the codes are of another scale than the one that is there.
    del found["2"]
    assert set(together("nvfp4", found).values()) == {"near"}
    # And it holds for all bytes or not at all.
    one = made[0]
    for role, byte in (("packed", 100), ("scale", 9)):
        raw = getattr(one, role).view(torch.uint8).clone()
        raw.view(-1)[byte] ^= 1
        damaged = one._replace(**{role: raw.view(getattr(one, role).dtype)})
        assert judged(tmp_path, group[0], damaged).rule != COMPRESSED, role


def test_compressed_scales_are_rounded_to_a_larger_one_alone(tmp_path: Path) -> None:
    """Under a smaller one the largest blocks do not fit: what is cut off is not the base."""
    base = weight("gaussian", 32, 64, 0)
    one = max_calibration(base)
    for factor, is_compressed in ((2.5, True), (0.5, False)):
        scale = (one.scale.float() / factor).clamp(2.0**-9, 448).to(one.scale.dtype)
        found = judged(tmp_path, base, Packed(one.packed, scale, one.global_scale * factor))
        assert (found.rule == COMPRESSED) is is_compressed, factor


def test_a_scale_chosen_otherwise_is_nearest_and_its_factor_is_told(tmp_path: Path) -> None:
    base = weight("gaussian", 32, 64, 0)
    found = judged(tmp_path, base, larger_global_scale(base))
    assert found.verdict == "reproduced" and found.factor == 1.0
    (one,) = with_shared_scales(format_proof("nvfp4"), {NAME: found}).values()
    assert one.verdict == "nearest" and one.factor == pytest.approx(1.7)
    assert one.first is not None and one.first.startswith("weight_scale_2 is 1.7")
    assert one.first.endswith(" times that of max calibration")
    # Beside a larger weight with the same scale, the factor of both is told.
    double = dataclasses.replace(found, amax=2 * found.amax)
    both = with_shared_scales(format_proof("nvfp4"), {NAME: found, "double": double})
    one, other = both[NAME], both["double"]
    assert (one.factor, one.group_factor) == (pytest.approx(1.7), pytest.approx(0.85))
    assert (other.factor, other.group_factor) == (pytest.approx(0.85), pytest.approx(0.85))
    assert (
        one.first is not None and ", 0.85" in one.first and one.first.endswith(" that of all modules with this scale")
    )
    assert other.first is not None and other.first.endswith(" times that of max calibration")


def test_factors_and_idle_scales_are_told_of_what_passes() -> None:
    other = {
        "plain": made_up(),
        "ulp": made_up("nearest", factor=1.0 + 2.0**-23),
        "twice": made_up("nearest", factor=2.0),
        "near": made_up("near", factor=9.0, counts=Counts(16, 16, scales_idle=7)),
        "idle": made_up("nearest", counts=Counts(16, 16, scales_idle=3)),
    }
    factors, idle = scale_words(other, [])
    assert (
        factors.startswith("2 modules")
        and "(ulp first), 1.00000012 to 2 times what their own largest value gives" in factors
    )
    assert "fused group" not in factors
    assert idle.startswith("3 idle scales in 1 modules (idle first)")
    assert scale_words({"plain": made_up()}, []) == []


def test_a_member_that_lost_the_scale_of_its_fused_group_is_named() -> None:
    """Its factor is over its own largest value then: a figure that says nothing of the group."""

    def one(scale: float, factor: float) -> Judgement:
        return dataclasses.replace(made_up("nearest", factor=factor), scale=scale)

    modules = {"q": one(2.0, 1.7), "k": one(1.0, 1.0), "v": one(1.0, 1.0), "alone": one(3.0, 1.5)}
    told = "; q no longer has the scale of the fused group, so that the factor is not over the group's"
    (words,) = scale_words(modules, [("q", "k", "v")])
    assert words.endswith(told) and words.startswith("2 modules")
    # All three moved together are still a group, and what is in no group has none to lose.
    modules |= {"k": one(2.0, 1.7), "v": one(2.0, 1.7)}
    assert "fused" not in scale_words(modules, [("q", "k", "v")])[0]
    assert "fused" not in scale_words(modules, [])[0]


def test_a_scale_under_which_all_codes_are_zero_proves_nothing(tmp_path: Path) -> None:
    base = weight("gaussian", 32, 64, 0)
    assert judged(tmp_path, base, larger_global_scale(base, 64.0)).passed
    assert not judged(tmp_path, base, larger_global_scale(base, 1e7)).passed


def made_up(verdict: str = "reproduced", amax: float = 2688.0, scale: float = 1.0, **more: object) -> Judgement:
    whole = Judgement(verdict, True, Counts(16, 16), amax, scale)  # type: ignore[arg-type]
    return dataclasses.replace(whole, **more)  # type: ignore[arg-type]


def test_scales_are_compared_where_all_was_compared_and_passed() -> None:
    rules = format_proof("nvfp4")
    other = {
        "sampled": made_up(scale=1.5, is_whole=False),
        "near": made_up("near", scale=2.5),
        "damaged": made_up("mismatch", scale=3.5),
    }
    assert with_shared_scales(rules, other) == other
    assert together("nvfp4", {"one": made_up(scale=1.5)}) == {"one": "nearest"}
    assert together("nvfp4", {"one": made_up("nearest", scale=1.5)}) == {"one": "nearest"}
    # One ulp of float32 is another scale.
    assert together("nvfp4", {"one": made_up(scale=1.0 + 2.0**-23)}) == {"one": "nearest"}


def test_the_largest_with_the_same_scale_counts_and_no_other() -> None:
    small = made_up(amax=1.0)
    assert together("nvfp4", {"small": small, "large": made_up()}) == {"small": "reproduced", "large": "reproduced"}
    assert together("nvfp4", {"large": made_up(), "small": small})["small"] == "reproduced"
    assert together("nvfp4", {"small": small, "larger": made_up(amax=5376.0)})["small"] == "nearest"
    assert together("nvfp4", {"small": small, "large": made_up(scale=2.0, amax=2 * 2688.0)})["small"] == "nearest"
    # A weight of zeros has no scale of its own.
    (zero,) = with_shared_scales(format_proof("nvfp4"), {"zero": made_up(amax=0.0)}).values()
    assert (zero.verdict, zero.factor) == ("nearest", 1.0)


@pytest.mark.parametrize(("related", "unrelated", "is_named"), [(1, 1, False), (1, 2, True), (3, 2, False)])
def test_another_base_is_named_where_most_modules_say_so(related: int, unrelated: int, is_named: bool) -> None:
    modules = {f"good {number}": made_up() for number in range(related)}
    modules |= {f"bad {number}": made_up("unrelated") for number in range(unrelated)}
    export: CheckpointReader = SimpleNamespace(path=Path("export"))  # type: ignore[assignment]
    faults = Faults()
    assert concluded(Proof("nvfp4", modules=modules), modules, export, faults).modules == modules
    if not is_named:
        assert not faults
        return
    with pytest.raises(InputError) as caught:
        faults.refuse()
    assert caught.value.code == "export.other_base" and f"{unrelated} of 3" in caught.value.message


@pytest.mark.parametrize("verdict", ["reproduced", "nearest", "near"])
def test_a_reciprocal_scale_is_named_where_it_fits(verdict: str) -> None:
    export: CheckpointReader = SimpleNamespace(path=Path("export"))  # type: ignore[assignment]
    divided = made_up(verdict, reading=Layout("low", "linear", "divide"))
    modules = {"one": divided, "other": made_up()}
    faults, others = Faults(), Faults()
    concluded(Proof("nvfp4", modules=modules), modules, export, faults)
    with pytest.raises(InputError, match="1 of 2 modules have a reciprocal"):
        faults.refuse()
    refuted = {"one": dataclasses.replace(divided, verdict="mismatch")}
    assert concluded(Proof("nvfp4", modules=refuted), refuted, export, others).modules == refuted and not others


def test_scales_of_a_build_are_compared_once_it_is_written() -> None:
    export: CheckpointReader = SimpleNamespace(path=Path("export"))  # type: ignore[assignment]
    modules = {"other scale": made_up(scale=1.5), "same": made_up()}
    found = concluded(Proof("nvfp4", modules=modules), modules, export, Faults()).modules
    assert {name: one.verdict for name, one in found.items()} == {"other scale": "nearest", "same": "reproduced"}


def test_what_rows_told_is_kept_beside_what_all_tell() -> None:
    """The closeness of sampled rows, where the codes decide."""
    export: CheckpointReader = SimpleNamespace(path=Path("export"))  # type: ignore[assignment]
    seen, own = Closeness(0.1, 1.0, 0.1, 0.1, 1.0), Closeness(0.2, 1.0, 0.1, 0.1, 1.0)
    before = Proof("nvfp4", modules={"one": made_up("near", closeness=seen), "kept": made_up("near")})
    after = concluded(before, {"one": made_up()}, export, Faults())
    assert after.modules["one"] == made_up(closeness=seen) and after.modules["kept"] == before.modules["kept"]
    after = concluded(before, {"one": made_up(closeness=own)}, export, Faults())
    assert after.modules["one"].closeness == own and before.modules["one"].verdict == "near"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100_000))
def test_sampled_rows_are_spread(num_rows: int) -> None:
    rows = sample_rows(num_rows, 16)
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == num_rows - 1
    assert len(rows) == num_rows if num_rows <= 18 else 16 <= len(rows) <= 18
    # No gap is wider than two strips.
    assert all(b - a <= 2 * -(-num_rows // 16) for a, b in itertools.pairwise(rows))
