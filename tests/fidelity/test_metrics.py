"""Figures against scipy, and where they have no number."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from modelopt_convert.fidelity import metrics
from modelopt_convert.fidelity.metrics import cosine, lpips_measure, psnr_db, rmse, spread, sqnr_db, ssim


def pictures(noise: float, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    one = torch.rand(2, size, size, 3, generator=draw)
    return one, (one + torch.randn(one.shape, generator=draw) * noise).clamp(0, 1)


@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_ssim_is_that_of_scipys_filter(noise: float) -> None:
    one, other = pictures(noise)
    found = []
    for left, right in zip(one.double().numpy(), other.double().numpy(), strict=True):
        for channel in range(3):

            def mean(values: np.ndarray) -> np.ndarray:
                return ndimage.gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

            x, y = left[..., channel], right[..., channel]
            mx, my = mean(x), mean(y)
            vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
            above = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4)
            found.append((above / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())
    assert ssim(one, other) == pytest.approx(np.mean(found), abs=1e-9)


def test_equal_pictures() -> None:
    one, _ = pictures(0.0)
    assert psnr_db(one, one) == math.inf and ssim(one, one) == pytest.approx(1.0) and rmse(one, one) == 0
    assert ssim(*pictures(0.1, size=10)) is None


def test_psnr_and_sqnr_are_decibels() -> None:
    one = torch.full((1, 4, 4, 3), 0.5)
    assert psnr_db(one, one + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0) and sqnr_db(1.0, 0.0) == math.inf and sqnr_db(0.0, 1.0) == 0.0


def test_cosine() -> None:
    x, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert cosine(x, x * 7) == pytest.approx(1.0) and cosine(x, -x) == pytest.approx(-1.0)
    assert cosine(zero, zero) == 1.0 and cosine(x, zero) == 0.0


@pytest.mark.parametrize("count", [2, 3, 8, 31, 32, 100, 1000])
def test_bounds_are_those_of_students_t(count: int) -> None:
    values = np.random.default_rng(count).normal(30, 2, count)
    found = spread([*map(float, values)])
    half = stats.t.ppf(0.95, count - 1) * stats.sem(values)
    assert found.mean == pytest.approx(values.mean()) and found.std == pytest.approx(values.std(ddof=1))
    assert found.lower95 == pytest.approx(values.mean() - half, abs=1e-3)
    assert found.upper95 == pytest.approx(values.mean() + half, abs=1e-3) and found.n == count


def test_bounds_of_few_and_of_infinite_figures() -> None:
    assert spread([3.0]).lower95 is None and spread([math.inf, 3.0]).lower95 is None
    assert spread([math.inf] * 8).lower95 == math.inf
    some = spread([math.inf, 30.0, 32.0])
    assert some.mean == math.inf and some.lower95 == spread([30.0, 32.0]).lower95 and some.n == 3


def test_lpips_runs_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lpips_measure() is None

    class Model:
        def eval(self) -> "Model":
            return self

        def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert one.shape == (2, 3, 24, 24) and float(one.min()) < -0.9
            return (one - other).abs().mean(dim=(1, 2, 3), keepdim=True)

    package = SimpleNamespace(LPIPS=lambda net, verbose: Model(), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lpips", package)
    metrics._lpips_model.cache_clear()
    measure = lpips_measure()
    metrics._lpips_model.cache_clear()
    one, other = pictures(0.1)
    assert measure is not None and measure(one, one) == 0.0
    assert measure(one, other) == pytest.approx(2 * float((one - other).abs().mean()), rel=1e-5)
