"""The judgement on sampled rows: what ModelOpt packs is proven, every planted fault is seen."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from faults import swizzle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.nvfp4.codes import swap_nibbles
from modelopt_convert.formats.nvfp4.scales import scale_readings
from modelopt_convert.formats.rows import sample_rows
from modelopt_convert.proof.closeness import Closeness
from modelopt_convert.proof.judgement import Judgement
from modelopt_convert.proof.nvfp4 import judge

MAX_ERROR = 0.15


@dataclasses.dataclass
class Packed:
    """A weight and what ModelOpt made of it (or of a neighbour of it)."""

    base: Tensor
    packed: Tensor
    scale: Tensor
    global_scale: Tensor

    def judge(self) -> Judgement:
        rows = sample_rows(len(self.base), 16)
        index = torch.tensor(rows)
        readings = scale_readings(self.scale, len(self.base), self.base.shape[1] // 16)
        return judge([self.base[index]], self.packed[index], readings, rows, self.global_scale, max_error=MAX_ERROR)


def pack(seed: int = 0, shape: tuple[int, int] = (256, 256), noise: float = 0.0) -> Packed:
    """A DiT-like weight packed by ModelOpt; with noise, a slightly different weight is packed, as by QAT."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(shape[1], generator=generator).pow(3) * 4 + 0.5
    base = (torch.randn(shape, generator=generator) * columns * 0.02).to(torch.bfloat16)
    trained = base.float() * (1 + noise * torch.randn(shape, generator=generator))
    oracle, scale, global_scale = NVFP4QTensor.quantize(trained.to(torch.bfloat16), 16)
    return Packed(base, oracle._quantized_data, scale, global_scale)


@pytest.mark.parametrize("shape", [(1, 16), (16, 32), (100, 48), (128, 64), (1000, 160)])
def test_what_modelopt_packed_is_reproduced(shape: tuple[int, int]) -> None:
    verdict = pack(shape=shape).judge()
    assert verdict.verdict == "reproduced" and verdict.codes == verdict.codes_equal > 0


def test_a_trained_neighbour_is_within_limits() -> None:
    verdict = pack(noise=0.02).judge()
    assert verdict.verdict == "within limits" and verdict.codes_equal < verdict.codes
    assert 0.05 < verdict.closeness.relative_error < 0.12


def _swap(one: Packed) -> None:
    one.packed = swap_nibbles(one.packed)


def _swizzle(one: Packed) -> None:
    one.scale = swizzle(one.scale)


def _both(one: Packed) -> None:
    _swap(one)
    _swizzle(one)


def _reciprocal(one: Packed) -> None:
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
def test_another_layout_is_found(plant: Callable[[Packed], None], reading: Layout, noise: float) -> None:
    one = pack(noise=noise)
    plant(one)
    verdict = one.judge()
    assert verdict.passed and verdict.reading == reading
    assert verdict.verdict == ("within limits" if noise else "reproduced")


def _global_scale_5_percent(one: Packed) -> None:
    one.global_scale = one.global_scale * 1.05


def _zero_scale_row(one: Packed) -> None:
    one.scale.view(torch.uint8)[sample_rows(len(one.base), 16)[3]] = 0


def _two_columns_dropped(one: Packed) -> None:
    one.packed[:, -1] = 0


def _tail_rows_zero(one: Packed) -> None:
    one.packed[-1:] = 0


def _scales_one_row_off(one: Packed) -> None:
    one.scale = one.scale.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)


def _scales_one_column_off(one: Packed) -> None:
    one.scale = one.scale.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)


def _block_dropped(one: Packed) -> None:
    one.packed[:, :8] = 0


FAULTS = [
    _global_scale_5_percent,
    _zero_scale_row,
    _two_columns_dropped,
    _tail_rows_zero,
    _scales_one_row_off,
    _scales_one_column_off,
    _block_dropped,
]


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("plant", FAULTS, ids=lambda function: function.__name__)
def test_a_fault_without_a_name_is_a_mismatch(plant: Callable[[Packed], None], noise: float) -> None:
    one = pack(noise=noise)
    plant(one)
    assert one.judge().verdict == "mismatch"


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_rows_permuted_or_another_base_are_unrelated(noise: float) -> None:
    one = pack(noise=noise)
    one.base = one.base[torch.randperm(len(one.base), generator=torch.Generator().manual_seed(1))]
    assert one.judge().verdict == "unrelated"
    other = pack(noise=noise)
    other.base = pack(seed=5).base
    assert other.judge().verdict == "unrelated"


def test_a_column_that_the_format_loses_is_not_held_against_the_export() -> None:
    """Measured on a real ``mtq.compress`` export: a right module had a column 0.73 off, beside outliers."""
    one = pack(noise=0.02)
    one.base[:, 1] = one.base[:, 1] * 0.01  # far below its block's amax: every quantizer rounds it to zero
    one.packed[:, 0] &= 0x0F
    verdict = one.judge()
    assert verdict.verdict == "within limits", verdict
    # The same column at its full size, dropped, is a fault.
    full = pack(noise=0.02)
    full.packed[:, 0] &= 0x0F
    assert full.judge().verdict == "mismatch"


def test_nan_is_never_within_limits() -> None:
    good = Closeness(0.1, 1.0, 0.1, 0.1, 1.0)
    assert good.within(MAX_ERROR)
    for field in ("relative_error", "gain", "worst_row", "worst_column"):
        assert not dataclasses.replace(good, **{field: float("nan")}).within(MAX_ERROR)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_are_reproduced_not_misjudged(value: float) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    base = torch.full((64, 64), value, dtype=torch.bfloat16)
    scale_of_one = torch.tensor(1.0 / 2688)
    oracle, scale, global_scale = NVFP4QTensor.quantize(base, 16, weights_scaling_factor_2=scale_of_one)
    assert Packed(base, oracle._quantized_data, scale, global_scale).judge().verdict == "reproduced"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100_000))
def test_sampled_rows_are_spread(num_rows: int) -> None:
    rows = sample_rows(num_rows, 16)
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == num_rows - 1
    assert len(rows) == num_rows if num_rows <= 18 else 16 <= len(rows) <= 18
    # No gap is wider than two strips.
    assert all(b - a <= 2 * -(-num_rows // 16) for a, b in itertools.pairwise(rows))
