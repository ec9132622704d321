"""The judgement on one FP8 module on disk: every rule by which ModelOpt divides, every single code, every limit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from judge_support import NAME, judged, together
from producers import (
    E4M3,
    PackedFp8,
    fp8_bf16,
    fp8_compressed,
    fp8_f16,
    fp8_f32,
    fp8_other_scale,
    fp8_qat,
    fp8_stretched,
)
from torch import Tensor
from weights import weight

from modelopt_convert.proof.judgement import Counts, format_proof, with_shared_scales
from modelopt_convert.run.errors import InputError

SHAPE = (200, 400)  # more codes than those after which a rule is given up


def with_steps(one: PackedFp8, places: list[int]) -> PackedFp8:
    """The neighbouring code at some places; none of them becomes NaN."""
    raw = one.codes.view(torch.uint8).clone()
    raw.view(-1)[torch.tensor(places)] ^= 1
    return one._replace(codes=raw.view(E4M3))


def error_of(base: Tensor, one: PackedFp8) -> float:
    return float((one.codes.double() * one.scale.double() - base.double()).norm() / base.double().norm())


@pytest.mark.parametrize(
    ("make", "stored", "casts", "rule"),
    [
        (fp8_bf16, torch.bfloat16, ("BF16",), "quotient in BF16"),
        (fp8_f16, torch.bfloat16, ("BF16", "F16"), "quotient in F16"),
        (lambda base: fp8_f16(base.half()), torch.float32, ("F32", "BF16", "F16"), "quotient in F16"),
        (fp8_f32, torch.bfloat16, ("BF16",), "quotient in F32"),
        (fp8_f32, torch.float32, ("F32",), "quotient in F32"),
        (fp8_compressed, torch.bfloat16, ("BF16",), "quotient in BF16, scale rounded to BF16"),
        (fp8_compressed, torch.float16, ("BF16", "F16"), "quotient in F16, scale rounded to F16"),
    ],
)
def test_every_rule_is_found_and_named(
    make: Callable[[Tensor], PackedFp8], stored: torch.dtype, casts: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    base = weight("gaussian", *SHAPE, 0, stored)
    verdict = judged(tmp_path, base, make(base), casts=casts)
    assert (verdict.verdict, verdict.rule) == ("reproduced", rule) and verdict.is_whole
    assert verdict.counts == Counts(80_000, 80_000) and verdict.first is None and verdict.clipped is None
    assert together("fp8", {NAME: verdict}) == {NAME: "reproduced"}


def test_no_rule_is_taken_for_another(tmp_path: Path) -> None:
    """An exporter's cast that the base rules out explains nothing."""
    base = weight("gaussian", *SHAPE, 0, torch.float32)
    verdict = judged(tmp_path, base, fp8_bf16(base), casts=("F32",))
    assert verdict.verdict != "reproduced" and verdict.rule is None and verdict.counts.codes_equal < 80_000


@pytest.mark.parametrize("place", [0, 77 * 400 + 5, 79_999])
def test_a_single_code_is_a_mismatch_and_named(place: int, tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    one = fp8_bf16(base)
    found = judged(tmp_path, base, with_steps(one, [place]))
    byte = int(one.codes.view(torch.uint8).view(-1)[place])
    where = f"row {place // 400}, column {place % 400}: expected code {byte:#04x}, found {byte ^ 1:#04x}"
    assert (found.verdict, found.first) == ("mismatch", where) and found.counts == Counts(80_000, 79_999)
    # Of two the first is named.
    later = with_steps(one, [place, 79_998])
    assert place > 79_998 or judged(tmp_path, base, later).first == where


@pytest.mark.parametrize(("count", "verdict"), [(799, "mismatch"), (800, "near")])
def test_few_other_codes_are_damage(count: int, verdict: str, tmp_path: Path) -> None:
    """Fewer than one of a hundred; other weights would change more."""
    base = weight("gaussian", *SHAPE, 0)
    found = judged(tmp_path, base, with_steps(fp8_bf16(base), [100 * number for number in range(count)]))
    assert (found.verdict, found.counts.codes_equal) == (verdict, 80_000 - count)


def test_a_few_rows_call_nothing_damage(tmp_path: Path) -> None:
    """They say no more than how near they are."""
    base = weight("gaussian", *SHAPE, 0)
    damaged = with_steps(fp8_bf16(base), [5 * 400])
    found = judged(tmp_path, base, damaged, rows=[0, 5, 9])
    assert (found.verdict, found.is_whole, found.counts) == ("near", False, Counts(1200, 1199))
    found = judged(tmp_path, base, damaged, rows=[0, 9])
    assert (found.verdict, found.is_whole, found.counts) == ("reproduced", False, Counts(800, 800))


def test_weights_trained_further_are_near_up_to_the_limit(tmp_path: Path) -> None:
    """Of the whole, and of every strip of 128 rows."""
    base = weight("gaussian", 256, 256, 0)
    one = fp8_qat(base)
    whole = error_of(base, one)
    strips = [error_of(base[part], one._replace(codes=one.codes[part])) for part in (slice(0, 128), slice(128, 256))]
    assert min(strips) < whole < max(strips)
    found = judged(tmp_path, base, one)
    assert found.verdict == "near" and found.closeness is not None and not found.passed
    assert found.closeness.relative_error == pytest.approx(whole, rel=1e-6)
    assert judged(tmp_path, base, one, max_error=max(strips) * 1.0001).verdict == "near"
    assert judged(tmp_path, base, one, max_error=(whole + max(strips)) / 2).verdict == "mismatch"
    assert judged(tmp_path, base, one, max_error=whole * 0.999).verdict == "mismatch"


@pytest.mark.parametrize(("factor", "verdict"), [(1.02, "near"), (1.03, "mismatch"), (2.0, "mismatch")])
def test_old_codes_under_another_scale_are_no_proof(factor: float, verdict: str, tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    assert judged(tmp_path, base, fp8_stretched(base, factor)).verdict == verdict


def test_another_base_is_unrelated(tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    assert judged(tmp_path, weight("gaussian", *SHAPE, 1), fp8_bf16(base)).verdict == "unrelated"
    mixed = base.float() * 0.7 + weight("gaussian", *SHAPE, 1).float() * 0.71
    assert judged(tmp_path, mixed.bfloat16(), fp8_bf16(base)).verdict == "mismatch"  # cosine 0.7


@pytest.mark.parametrize("factor", [0.5, 1.02])
def test_another_scale_is_nearest_and_what_it_clips_is_told(factor: float, tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    found = judged(tmp_path, base, fp8_other_scale(base, factor))
    (one,) = with_shared_scales(format_proof("fp8"), {NAME: found}).values()
    assert one.verdict == "nearest" and one.factor == pytest.approx(factor)
    beyond = int((base.float().abs() > 448 * float(found.scale) * (1 + 2.0**-9)).sum())
    if factor > 1:
        assert found.clipped is None
    else:
        assert found.clipped is not None and found.clipped.count >= beyond > 0
        assert found.clipped.largest == pytest.approx(448 / factor)


def test_a_scale_that_cuts_off_too_much_is_a_mismatch(tmp_path: Path) -> None:
    """Although every code is the one that it gives."""
    base = weight("gaussian", *SHAPE, 0)
    found = judged(tmp_path, base, fp8_other_scale(base, 0.1))
    assert found.verdict == "mismatch" and found.counts.codes == found.counts.codes_equal


def test_a_scale_under_which_all_codes_are_zero_proves_nothing(tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    found = judged(tmp_path, base, fp8_other_scale(base, 1e6))
    assert not found.passed and found.counts.codes == found.counts.codes_equal


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_refused(byte: int, tmp_path: Path) -> None:
    base = weight("gaussian", *SHAPE, 0)
    one = fp8_bf16(base)
    raw = one.codes.view(torch.uint8).clone()
    raw[123, 4] = byte
    with pytest.raises(InputError) as caught:
        judged(tmp_path, base, one._replace(codes=raw.view(E4M3)))
    assert caught.value.code == "export.not_finite" and "found 1 NaN" in caught.value.message
