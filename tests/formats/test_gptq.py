"""Codes by GPTQ: as good as ModelOpt's, and the same bits however the work is cut and sums are taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update
from moments import example, scaled
from root import ROOT
from torch import Tensor

from modelopt_convert.formats.nvfp4 import gptq
from modelopt_convert.formats.nvfp4.codes import decode_e2m1, encode_e2m1, unpack_e2m1
from modelopt_convert.formats.nvfp4.gptq import Compensation, compensation, gptq_codes
from modelopt_convert.formats.nvfp4.shapes import num_stored

SHAPES = [(8, 16), (24, 128), (40, 144), (16, 272), (64, 400)]


def error(values: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Squared error of the outputs."""
    off = values - weight.double()
    return float(((off @ moments) * off).sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES))
def test_outputs_are_as_near_as_by_modelopts_own(seed: int, shape: tuple[int, int]) -> None:
    weight, moments = example(seed, *shape)
    nearest, scale, global_scale, factors = scaled(weight, moments)
    found, damping = compensation(moments)
    mine = decode_e2m1(unpack_e2m1(gptq_codes(weight, scale, global_scale, found))).double() * factors

    def rounded(values: Tensor) -> Tensor:
        return decode_e2m1(encode_e2m1((values / factors).float())).double() * factors

    theirs = weight.double()
    gptq_blockwise_update(theirs, compute_hessian_inverse(moments, theirs, 0.01), 128, rounded)
    assert damping == 0.01 and error(theirs, weight, moments) > 0
    assert error(mine, weight, moments) == pytest.approx(error(theirs, weight, moments), rel=0.1)
    assert float((mine == theirs).double().mean()) > 0.8  # what differs once goes on to differ
    if shape[1] > 64:
        assert error(mine, weight, moments) < error(decode_e2m1(unpack_e2m1(nearest)) * factors, weight, moments)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES))
def test_each_column_has_what_the_inverse_says(seed: int, shape: tuple[int, int]) -> None:
    """The rows of the factor of the inverse, each by its diagonal: ModelOpt's, to 15 bits of the column's largest."""
    weight, moments = example(seed, *shape)
    upper = compute_hessian_inverse(moments, torch.ones_like(weight, dtype=torch.float64), 0.01)
    wanted = (upper / upper.diagonal()[:, None]).triu(1)
    found, _ = compensation(moments)
    assert len(found.panels) == num_stored(shape[1]) and found.panels.dtype == torch.int16
    for first in range(0, shape[1], 128):
        panel = found.panel(first).T * torch.exp2(found.exponents[first : first + 128].double())
        above = wanted[: first + 128, first : first + 128]
        assert panel.shape == above.shape
        largest = above.abs().amax(0)
        assert bool(((panel - above).abs() <= largest * 2.0**-14 + 1e-9).all())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.data())
def test_rows_are_the_same_alone_and_together(seed: int, shape: tuple[int, int], data: st.DataObject) -> None:
    weight, moments = example(seed, *shape)
    _, scale, global_scale, _ = scaled(weight, moments)
    found, _ = compensation(moments)
    whole = gptq_codes(weight, scale, global_scale, found)
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=shape[0]))
    assert torch.equal(gptq_codes(weight[rows], scale[rows], global_scale, found), whole[rows])


def test_no_order_of_additions_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of matrices is one of whole numbers, whose sums float64 holds exactly, whatever is added first."""
    plain, seen = torch.Tensor.__matmul__, list[int]()

    def looked_at(one: Tensor, other: Tensor) -> Tensor:
        assert torch.equal(one, one.round()) and torch.equal(other, other.round())
        assert float(one.abs().amax()) <= 2**15 - 1 and float(other.abs().amax()) <= 2**23
        assert (2**15 - 1) * 2**23 * gptq.MOST_COLUMNS <= 2**53
        seen.append(one.shape[1])
        return plain(one.flip(1), other.flip(0))

    for seed, wide in ((1, 1.0), (2, 1e3), (3, 1e-3)):
        weight, moments = example(seed, 32, 528)
        weight[3, ::17] *= wide  # errors that run away
        _, scale, global_scale, _ = scaled(weight, moments)
        found, _ = compensation(moments)
        plainly = gptq_codes(weight, scale, global_scale, found)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", looked_at)
            assert torch.equal(gptq_codes(weight, scale, global_scale, found), plainly)
    assert seen == [128, 256, 384, 512] * 3


def test_inputs_of_which_none_go_together_leave_codes_nearest() -> None:
    weight, moments = example(5, 16, 160)
    alone = torch.diag(moments.diagonal())
    nearest, scale, global_scale, _ = scaled(weight, alone)
    for given_moments in (alone, torch.zeros_like(alone)):
        found, _ = compensation(given_moments)
        assert not found.panels.any()
        assert torch.equal(gptq_codes(weight, scale, global_scale, found), nearest)


def test_moments_that_are_singular_get_more_damping_or_are_told() -> None:
    row = torch.exp(torch.linspace(-8, 8, 256, dtype=torch.float64))
    found, damping = compensation(torch.outer(row, row))
    assert damping >= 0.01 and bool(found.panels.any())
    off = torch.outer(row, row)
    off[0, 0] -= 0.05 * off.diagonal().mean()  # no sum of squares: as rounding may leave it
    assert compensation(off)[1] > 0.01
    none = torch.eye(32, dtype=torch.float64)
    none[3, 4] = none[4, 3] = 50.0
    with pytest.raises(ValueError, match="a matrix that is none"):
        compensation(none)
    off[3, 4] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        compensation(off)
    with pytest.raises(ValueError, match="at most 32768 columns"):
        compensation(torch.zeros(1, dtype=torch.float64).expand(32769, 32769))


def test_it_is_the_same_after_it_was_stored() -> None:
    found, _ = compensation(example(6, 8, 272)[1])
    again = Compensation.from_bytes(found.panels.numpy().tobytes(), found.exponents.numpy().tobytes())
    assert torch.equal(again.panels, found.panels) and torch.equal(again.exponents, found.exponents)


KERNEL = """
import sys
from moments import example, scaled
from modelopt_convert.formats.nvfp4 import gptq, panel_kernel
from modelopt_convert.formats.nvfp4.gptq import compensation, gptq_codes

for seed, shape in enumerate(((5, 48), (33, 16), (1, 32))):
    weight, moments = example(seed, *shape)
    weight[0, ::7] *= 1000
    weight[shape[0] // 2] = 0
    _, scale, global_scale, _ = scaled(weight, moments)
    found, _ = compensation(moments)
    wanted = gptq_codes(weight, scale, global_scale, found)
    gptq._panel_rounder = lambda _: panel_kernel.round_panel
    assert gptq_codes(weight, scale, global_scale, found).equal(wanted), shape
    gptq._panel_rounder = lambda _: gptq.round_panel
"""


def test_the_kernel_gives_the_bits_of_plain_torch_in_the_interpreter(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_divides_as_ieee_says(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_convert.formats.nvfp4.panel_kernel import compile_ahead

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compile_ahead(capability)
    assert "div.rn.f64" in code and "div.approx" not in code and "div.full" not in code
