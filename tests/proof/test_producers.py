"""The producers that the proof is tried with: ModelOpt's own arithmetic where it has any, and what each promises."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fp8_support import modelopt_cast
from producers import (
    E4M3,
    FP8_PRODUCERS,
    NVFP4_PRODUCERS,
    VERDICTS,
    Packed,
    block_errors,
    by_bf16_product,
    by_reciprocal,
    compressed_group,
    dequantized,
    each,
    four_over_six,
    four_over_six_modelopt,
    fp8_bf16,
    fp8_compressed,
    fp8_f16,
    fp8_f32,
    fused_group,
    gptq,
    in_two_steps,
    in_two_steps_by_reciprocal,
    is_nearest,
    larger_global_scale,
    lora,
    max_calibration,
    max_calibration_0_44,
    max_scales,
    mse_sweep,
    qat,
    scales_in_two_steps,
    searched,
    signed_zeros,
    ties_away,
    unpack,
    weighted_search,
)
from support import load, same_bits
from torch import Tensor
from truth import equal, midpoint_distance, strongest
from weights import DISTRIBUTIONS, weight

SHAPES = [(1, 16), (7, 48), (130, 256)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TIES = [by_reciprocal, in_two_steps, in_two_steps_by_reciprocal, ties_away]
every_kind = pytest.mark.parametrize("kind", DISTRIBUTIONS)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_max_calibration_is_modelopts(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    for seed in range(3):
        base = weight(kind, *shape, seed, dtype)
        if not bool(base.any()):
            continue  # the smallest weights are none in F16
        packed, scale, global_scale = NVFP4QTensor.quantize(base.clone(), 16)
        assert equal(max_calibration(base), Packed(packed._quantized_data, scale, global_scale))


@every_kind
def test_a_fused_group_is_modelopts(kind: str) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    group = [weight(kind, 64, 64, seed) * factor for seed, factor in enumerate((1, 0.3, 2.5))]
    found = fused_group(group)
    for base, one in zip(group, found, strict=True):
        packed, scale, global_scale = NVFP4QTensor.quantize(base.clone(), 16, None, found[0].global_scale)
        assert equal(one, Packed(packed._quantized_data, scale, global_scale))
    assert max(float(max_calibration(base).global_scale) for base in group) == float(found[0].global_scale)


def test_a_compressed_group_is_modelopts(exports: Path) -> None:
    """A real export after ``mtq.compress``, whose queries, keys and values share a global scale."""
    base, export = load(exports / "base" / "transformer"), load(exports / "nvfp4_compressed" / "transformer")
    rounded_again = 0
    for block in ("transformer_blocks.0.attn", "transformer_blocks.1.attn"):
        names = [f"{block}.{part}" for part in ("to_q", "to_k", "to_v")]
        group = [base[f"{name}.weight"].bfloat16() for name in names]
        for name, member, one in zip(names, group, compressed_group(group), strict=True):
            stored = (export[f"{name}.{role}"] for role in ("weight", "weight_scale", "weight_scale_2"))
            assert equal(one, Packed(*stored)), name
            rounded_again += not same_bits(one.scale, max_calibration(member, one.global_scale).scale)
    assert rounded_again == 4


def test_zero_scales_of_0_44_are_where_a_scale_underflows() -> None:
    base = weight("wide", 128, 256, 0)
    today, old = max_calibration(base), max_calibration_0_44(base)
    zero = old.scale.view(torch.uint8) == 0
    assert 0 < int(zero.sum()) < zero.numel()
    assert torch.equal(zero, max_scales(base, old.global_scale) <= 2.0**-10)
    assert torch.equal(old.scale.view(torch.uint8)[~zero], today.scale.view(torch.uint8)[~zero])
    assert set((unpack(old.packed)[each(zero)] % 8).tolist()) <= {7, 0}


@every_kind
@pytest.mark.parametrize("producer", TIES)
def test_other_rounding_differs_at_midpoints_alone(kind: str, producer: Callable[[Tensor], Packed]) -> None:
    """Within 2 ulp of float32, and then by one code."""
    base = weight(kind, 256, 512, 1)
    common, other = max_calibration(base), producer(base)
    assert same_bits(common.scale, other.scale) and same_bits(common.global_scale, other.global_scale)
    left, right = unpack(common.packed), unpack(other.packed)
    differ = left != right
    assert float(midpoint_distance(base, common)[differ].amax() if differ.any() else 0) <= 2.0**-22
    assert not bool(((left[differ].int() - right[differ].int()).abs() != 1).any())


@pytest.mark.parametrize("producer", TIES)
def test_other_rounding_does_differ(producer: Callable[[Tensor], Packed]) -> None:
    """How often depends on the largest value of a weight."""
    bases = [weight(kind, 256, 512, seed) for seed in range(4) for kind in ("gaussian", "many_ties")]
    counts = [int((unpack(producer(base).packed) != unpack(max_calibration(base).packed)).sum()) for base in bases]
    assert sum(counts) > 100 and max(counts) < 1000


def test_scales_in_two_steps_are_neighbours_at_midpoints() -> None:
    count = 0
    for kind in DISTRIBUTIONS:
        base = weight(kind, 256, 512, 0)
        common, other = max_calibration(base), scales_in_two_steps(base)
        left, right = common.scale.view(torch.uint8).int(), other.scale.view(torch.uint8).int()
        differ = left != right
        count += int(differ.sum())
        assert not bool(((left - right).abs() > 1).any())
        middle = (common.scale.double() + other.scale.double())[differ] / 2
        exact = max_scales(base, common.global_scale).double()[differ]
        assert not bool(((exact / middle - 1).abs() > 2.0**-22).any())
        assert torch.equal(common.packed[~differ.any(1)], other.packed[~differ.any(1)])
    assert count > 0


def test_a_product_in_bf16_is_no_tie() -> None:
    base = weight("gaussian", 256, 512, 0)
    differ = unpack(by_bf16_product(base).packed) != unpack(max_calibration(base).packed)
    far = midpoint_distance(base, max_calibration(base))[differ]
    assert 1e-4 < float(far.amax()) < 4e-3


def test_signed_zeros_change_no_value() -> None:
    base = weight("sparse", 64, 64, 0)
    common, other = max_calibration(base), signed_zeros(base)
    assert torch.equal(dequantized(common), dequantized(other)) and not torch.equal(common.packed, other.packed)


@every_kind
@pytest.mark.parametrize("producer", [mse_sweep, four_over_six, four_over_six_modelopt, larger_global_scale])
def test_a_plain_search_is_nowhere_worse_than_max_calibration(kind: str, producer: Callable[[Tensor], Packed]) -> None:
    """Under its own global scale; all codes are the nearest, and nothing is clipped by it."""
    base = weight(kind, 130, 256, 2)
    one = producer(base)
    common = max_calibration(base, one.global_scale)
    assert bool((block_errors(base, one) <= block_errors(base, common)).all())
    assert bool(is_nearest(base, one).all())
    assert float(one.global_scale) * 6 * 448 >= float(base.float().abs().max()) * (1 - 2.0**-22)


@pytest.mark.parametrize("producer", [mse_sweep, four_over_six, four_over_six_modelopt])
def test_a_search_finds_something(producer: Callable[[Tensor], Packed]) -> None:
    base = weight("outlier_channels", 256, 256, 0)
    one = producer(base)
    assert not same_bits(one.scale, max_calibration(base, one.global_scale).scale)
    assert float(block_errors(base, one).sum()) < 0.99 * float(block_errors(base, max_calibration(base)).sum())


def test_a_weighted_search_is_worse_in_many_blocks_and_nearest_in_all() -> None:
    base = weight("outlier_channels", 256, 256, 0)
    one = weighted_search(base)
    worse = block_errors(base, one) > block_errors(base, max_calibration(base)) * (1 + 1e-9)
    assert 0.1 < float(worse.double().mean()) < 0.7
    assert bool(is_nearest(base, one).all())


def test_an_importance_of_one_is_the_plain_search() -> None:
    base = weight("gaussian", 64, 256, 0)
    assert equal(searched(base, torch.ones(256)), mse_sweep(base))


@pytest.mark.parametrize("producer", [gptq, qat, lora])
def test_other_weights_are_near_and_not_nearest(producer: Callable[[Tensor], Packed]) -> None:
    base = weight("outlier_channels", 256, 256, 0)
    one = producer(base)
    assert not bool(is_nearest(base, one).all())
    error = float((dequantized(one) - base.double()).norm() / base.double().norm())
    assert float(block_errors(base, max_calibration(base)).sum() ** 0.5 / base.double().norm()) < error < 0.15


def test_gptq_serves_its_inputs_better() -> None:
    """On the inputs that made its Hessian, the output's error is below that of max calibration."""
    base = weight("outlier_channels", 128, 256, 0)
    mixed = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 16
    inputs = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = inputs @ (torch.eye(256, dtype=torch.float64) + mixed)
    errors = [
        float((inputs @ (dequantized(one) - base.double()).T).norm()) for one in (gptq(base), max_calibration(base))
    ]
    assert errors[0] < 0.95 * errors[1]


@every_kind
def test_fp8_rules_are_modelopts(kind: str) -> None:
    """Its exporter's cast of a BF16, F16 or F32 weight, and its real quantizer, whose scale has the weight's dtype."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    for dtype, make in zip(DTYPES, (fp8_bf16, fp8_f16, fp8_f32), strict=True):
        base = weight(kind, 130, 256, 3, dtype)
        if not bool(base.any()):
            continue
        found = make(base)
        assert same_bits(found.scale, base.abs().max().float() / 448)
        assert same_bits(found.codes, modelopt_cast(base, found.scale))
        if dtype != torch.float32 and float(found.scale.to(dtype)):
            codes, scale = FP8QTensor.quantize(base.clone(), base.abs().max().float().div(448).to(dtype).reshape(1, 1))
            assert same_bits(fp8_compressed(base).codes, codes._quantized_data) and scale.dtype == dtype


@pytest.mark.parametrize("name", NVFP4_PRODUCERS)
def test_every_producer_comes_to_its_verdict_or_a_stronger_one(name: str) -> None:
    producer = NVFP4_PRODUCERS[name]
    bases = [weight(kind, 128, 256, seed) for kind in DISTRIBUTIONS for seed in range(3)]
    found = {VERDICTS.index(strongest(base, producer.make(base))) for base in bases}
    assert max(found) == VERDICTS.index(producer.verdict), found


@pytest.mark.parametrize("name", NVFP4_PRODUCERS)
def test_producers_give_what_an_export_holds(name: str) -> None:
    for seed, kind in enumerate(DISTRIBUTIONS):
        base = weight(kind, 7, 48, seed)
        one = NVFP4_PRODUCERS[name].make(base)
        assert (one.packed.dtype, one.packed.shape) == (torch.uint8, (7, 24))
        assert (one.scale.dtype, one.scale.shape) == (E4M3, (7, 3)) and one.scale.is_contiguous()
        assert (one.global_scale.dtype, one.global_scale.shape) == (torch.float32, ())
        assert not bool(one.scale.float().isnan().any()) and float(one.scale.float().min()) >= 0


@pytest.mark.parametrize("name", FP8_PRODUCERS)
def test_fp8_producers_give_what_an_export_holds(name: str) -> None:
    base = weight("outlier_channels", 7, 48, 0)
    one = FP8_PRODUCERS[name].make(base)
    assert (one.codes.dtype, one.codes.shape, one.scale.dtype, one.scale.shape) == (E4M3, (7, 48), torch.float32, ())
    assert not bool(one.codes.float().isnan().any())
