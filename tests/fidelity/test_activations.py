"""Activations as engines quantize them: against ModelOpt's cast, ml_dtypes' casts and the laws of the format."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_flux1 import fp8_activations, nvfp4_activations

from modelopt_convert.fidelity.activations import dynamic, quantizer_of
from modelopt_convert.fidelity.activations.nvfp4 import round_to_e2m1
from modelopt_convert.formats.nvfp4.codes import decode_e2m1
from modelopt_convert.formats.table import FORMATS

NVFP4, FP8 = quantizer_of("nvfp4"), quantizer_of("fp8")
_SEEDS = st.integers(0, 2**31)
_SIZES = st.sampled_from([1e-6, 1e-3, 1.0, 37.5, 4e4])


def rows(seed: int, size: float, outlier: float = 1.0) -> torch.Tensor:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * size
    values[2, 16:32] = 0
    values[0, 7] *= outlier
    return values.bfloat16()


def test_the_cast_is_modelopts_over_every_bf16_value() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = values[values.isfinite()].float()
    assert len(finite) == 65280
    theirs = decode_e2m1(NVFP4QTensor._cast_fp4(finite.clone()).to(torch.uint8) & 15)
    assert torch.equal(round_to_e2m1(finite), theirs)


def test_the_cast_saturates_and_takes_no_number_for_zero() -> None:
    found = round_to_e2m1(torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, 5.0, 2.5, -0.25, 0.75]))
    assert found.tolist() == [6.0, -6.0, 0.0, 6.0, 4.0, 2.0, 0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(_SEEDS, _SIZES, st.sampled_from([1.0, 100.0]), st.sampled_from([1e-7, 1e-4, 0.01, 1.0, 50.0]))
def test_static_scales_give_what_ml_dtypes_gives(seed: int, size: float, outlier: float, scale: float) -> None:
    values, input_scale = rows(seed, size, outlier), torch.tensor(scale)
    for quantizer, other in ((NVFP4, nvfp4_activations), (FP8, fp8_activations)):
        found = quantizer.static(values, input_scale)
        assert found.operand.dtype == torch.bfloat16 and float(found.scale) == float(input_scale)
        theirs = other(values.float().numpy(), np.float32(scale))
        assert np.array_equal(found.operand.float().numpy(), theirs)


@settings(max_examples=40, deadline=None)
@given(_SEEDS, _SIZES)
def test_laws(seed: int, size: float) -> None:
    values = rows(seed, size)
    for algorithm in FORMATS:
        found = dynamic(algorithm, values)
        got = found.operand.float() * found.scale
        assert not got[values == 0].any()
        assert not (got.abs() > found.limit * (1 + 1e-6)).any()
        assert torch.equal(dynamic(algorithm, -values).operand, -found.operand)
        louder = dynamic(algorithm, values * 8)  # a power of two changes the scale alone
        assert torch.equal(louder.operand, found.operand) and torch.allclose(louder.scale, found.scale * 8, rtol=1e-6)
        block = values.float().view(5, -1, 16).abs().amax(dim=-1, keepdim=True)
        error = (got - values.float()).view(5, -1, 16).abs()
        # Half of E2M1's widest step is a sixth of the largest value; a scale is off by a sixteenth, or, if tiny, lost.
        assert not (error > 0.27 * block + 2.0**-9 * 6 * found.scale.max()).any()


def test_blocks_do_not_touch_each_other() -> None:
    values = rows(3, 1.0)
    order = torch.tensor([2, 0, 3, 1])
    moved = values.view(5, 4, 16)[:, order].reshape(5, 64)
    scale = torch.tensor(0.01)
    mine = NVFP4.static(values, scale).operand.view(5, 4, 16)[:, order].reshape(5, 64)
    assert torch.equal(NVFP4.static(moved, scale).operand, mine)


def test_a_scale_that_is_too_large_loses_small_blocks_and_one_too_small_clips() -> None:
    values = rows(4, 1e-4)
    assert not NVFP4.static(values, torch.tensor(1.0)).operand.any()  # a block scale below 2^-10 underflows to 0
    found = NVFP4.static(rows(4, 1e4), torch.tensor(1.0))
    assert float(found.operand.abs().max()) == float(found.limit) == 2688.0


@pytest.mark.parametrize("algorithm", FORMATS)
def test_rows_of_zeros_stay_zeros(algorithm: str) -> None:
    found = dynamic(algorithm, torch.zeros(3, 32, dtype=torch.bfloat16))
    assert not found.operand.any() and bool(found.scale.isfinite().all())
