"""What is kept of inputs, against figures by other means; and how runs are put together."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modelopt_convert.fidelity import moments
from modelopt_convert.fidelity.calibration import BINS, Watch
from modelopt_convert.fidelity.runs import Run, merged, read_run, run_of
from modelopt_convert.formats.nvfp4.gptq import Compensation
from modelopt_convert.run.errors import InputError
from modelopt_convert.stage.resumable import Parts

SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3)


class Two(nn.Module):
    """Two Linears, of which one is used."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.used = nn.Linear(columns, 2).to(torch.bfloat16)
        self.idle = nn.Linear(columns, 2)


@settings(deadline=None)
@given(columns=st.sampled_from([1, 15, 16, 33]), shapes=SHAPES, power=st.integers(-40, 40), seed=st.integers(0, 99))
def test_statistics_are_those_of_the_definition(
    columns: int, shapes: list[tuple[int, int]], power: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    model = Two(columns)
    inputs = [(torch.randn(*shape, columns, generator=draw) * 2.0**power).bfloat16() for shape in shapes]
    inputs[0][0, 0, 0] = 0
    with Watch({"": model}) as watch, torch.inference_mode():
        for number, one in enumerate(inputs):
            model.used(one) if number % 2 else model.used(input=one)
    assert watch.names == ["used", "idle"] and list(watch.seen) == ["used"]
    found = watch.seen["used"]
    rows = np.concatenate([one.flatten(0, -2).double().numpy() for one in inputs])
    assert found.rows == len(rows) and float(found.amax) == np.abs(rows).max()
    for channel in range(columns):
        assert math.isclose(float(found.squares[channel]), math.fsum(rows[:, channel] ** 2), rel_tol=1e-14)
    bins = [0] * BINS
    for row in rows:
        for begin in range(0, columns, 16):
            largest = np.abs(row[begin : begin + 16]).max()
            bins[0 if largest < 2.0**-126 else 126 + math.frexp(largest)[1]] += 1
    assert found.histogram.tolist() == bins


def test_hooks_are_gone_afterwards() -> None:
    model = Two(4)
    with Watch({"": model}):
        pass
    assert not model.used._forward_pre_hooks


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_module_that_is_not_finite_is_named(bad: float) -> None:
    model = Two(4)
    with Watch({"part/": model}) as watch, torch.inference_mode():
        model.idle(torch.ones(1, 4))
        watch.refuse_not_finite("in step 1")
        model.used(torch.tensor([[1.0, bad, 1.0, 1.0]]).bfloat16())
        model.used(torch.ones(1, 4).bfloat16())  # what was seen once stays seen
        with pytest.raises(InputError, match=r"part/used.*in step 2; 1 modules") as refused:
            watch.refuse_not_finite("in step 2")
    assert refused.value.code == "calibrate.not_finite"


def _run(seed: int) -> Run:
    draw = torch.Generator().manual_seed(seed)
    model = Two(8)
    with Watch({"": model}) as watch, torch.inference_mode():
        model.used((torch.randn(3, 8, generator=draw) * 10 ** (seed % 3)).bfloat16())
    return run_of(watch, {"steps": 1}, "cpu")


def test_a_run_is_the_same_after_it_was_kept() -> None:
    run = _run(1)
    again = read_run(run.to_bytes())
    assert again is not None and again.to_bytes() == run.to_bytes()
    assert (again.settings, again.device, again.names) == ({"steps": 1}, "cpu", ("used", "idle"))


def test_runs_together_are_the_largest_and_the_mean() -> None:
    runs = [_run(seed) for seed in range(5)]
    found = merged(runs)
    amax = [float(run.seen["used"].amax) for run in runs]
    modules = found.modules("", {})
    assert modules["used"] == {"n": 15, "amax": max(amax), "amax_by_half": [max(amax[::2]), max(amax[1::2])]}
    assert found.modules("", {"used": "other"})["used"]["compensation"] == "other"
    assert modules["idle"] == {"n": 0, "amax": None, "amax_by_half": [None, None]}
    total = sum(run.seen["used"].squares for run in runs)  # from left to right
    assert torch.equal(found.tensors()["used.mean_square"], (total / 15).float())
    assert sum(found.tensors()["used.histogram"].tolist()) == 15
    assert found.half_ratio() == min(max(amax[::2]), max(amax[1::2])) / max(amax)
    assert merged(runs[:1]).half_ratio() is None


def test_what_no_run_wrote_is_no_run(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "calib")
    parts.open()
    parts.put(3, _run(1).to_bytes())
    assert parts.read(3) == _run(1).to_bytes() and parts.read(2) is None
    path = parts.path / "part-00003"
    raw = path.read_bytes()
    for torn in (raw[:-1], raw[:10], b"", raw[:40] + b"x" + raw[41:]):
        path.write_bytes(torn)
        assert parts.read(3) is None
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_moments_are_damped_until_weights_stay_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the matrix itself asked for more than the least damping."""
    parts, tried = Parts(tmp_path / "calib"), list[float]()
    parts.open()

    def compensated(_: torch.Tensor, least: float) -> tuple[Compensation, float]:
        tried.append(max(least, 0.1))  # singular below
        return Compensation(torch.zeros(64, dtype=torch.int16), torch.zeros(8, dtype=torch.int16)), tried[-1]

    monkeypatch.setattr(moments, "compensation", compensated)
    monkeypatch.setattr(moments, "stays_near", lambda *_: tried[-1] >= 0.3)
    kept = moments.KeptCompensations(parts, 3, ["a"], {})
    kept.keep("a", torch.eye(8), lambda: [(torch.ones(16, 8), torch.ones(8))])
    found = kept.read("a")
    assert found is not None and found.damping == 0.3 and tried == [0.1, 0.3]
