"""Emulated layers against float64, how they take the place of linear ones, and a self-test that sees what is wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_flux1 import independent_layer
from torch import nn
from torch.nn import functional

from modelopt_convert.fidelity import emulation
from modelopt_convert.fidelity.activations import nvfp4
from modelopt_convert.fidelity.emulation import Emulated, emulated
from modelopt_convert.fidelity.selftest import self_test
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import BackendError
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Weight, operand_format

CPU = torch.device("cpu")


def weight_of(algorithm: str, rows: int = 48, columns: int = 64) -> Weight:
    draw = torch.Generator().manual_seed(7)
    values = torch.randn(rows, columns, generator=draw).bfloat16()
    return operand_format(algorithm).quantized(values, torch.randn(rows, generator=draw).bfloat16())


def stored(weight: Any, input_scale: float | None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with this weight."""
    found = {"a.bias": weight.bias}
    if weight.algorithm == "nvfp4":
        found |= {"a.weight": weight.packed, "a.weight_scale": weight.scale}
        found["a.weight_scale_2"] = torch.tensor(weight.tensor_scale)
    else:
        found |= {"a.weight": weight.codes, "a.weight_scale": torch.tensor(weight.tensor_scale)}
    return found | ({"a.input_scale": torch.tensor(input_scale)} if input_scale is not None else {})


@pytest.mark.parametrize("input_scale", [None, 0.002, 0.02])
@pytest.mark.parametrize("algorithm", FORMATS)
def test_a_layer_is_that_of_other_code(algorithm: str, input_scale: float | None) -> None:
    """Sums in float32 round otherwise than in float64 in a few places, by one step of BF16."""
    weight = weight_of(algorithm)
    values = torch.randn(3, 11, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    layer = Emulated(weight, "dynamic" if input_scale is None else "static", input_scale)
    found, theirs = layer(values), independent_layer(stored(weight, input_scale), "a")(values)
    assert found.shape == (3, 11, 48) and found.dtype == torch.bfloat16
    assert float((found == theirs).float().mean()) > 0.995
    assert torch.allclose(found.float(), theirs.float(), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("algorithm", FORMATS)
def test_weight_only_is_a_linear_layer_of_the_decoded_weight(algorithm: str) -> None:
    weight = weight_of(algorithm)
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    exact = (weight.decode(0, 48).float() * weight.tensor_scale).bfloat16()
    assert weight.bias is not None
    assert torch.equal(Emulated(weight, "weight-only")(values), functional.linear(values, exact, weight.bias))


def test_a_kept_weight_gives_the_same_and_a_decoded_one_is_not_kept() -> None:
    weight, values = weight_of("nvfp4"), torch.randn(4, 64).bfloat16()
    kept, decoded = Emulated(weight, "dynamic", keep=True), Emulated(weight, "dynamic")
    assert torch.equal(kept(values), decoded(values))
    assert kept.decoded(CPU) is kept.decoded(CPU) and decoded.decoded(CPU) is not decoded.decoded(CPU)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
        self.bfloat16()

    def forward(self, values: torch.Tensor) -> Any:
        return self.inner(values)


def test_layers_are_put_in_place_and_back() -> None:
    model, weight = Small(), weight_of("nvfp4")
    values = torch.randn(3, 64).bfloat16()
    before, first = model(values), model.inner[0]
    with emulated(model, {"inner.0": weight}, "dynamic", {}) as changed:
        assert changed is model and isinstance(model.inner[0], Emulated)
        assert torch.equal(model.inner[0](values), Emulated(weight, "dynamic")(values))
        assert not torch.equal(model(values), before)
        assert next(iter(model.inner[0].parameters())).dtype == torch.bfloat16
    assert model.inner[0] is first and torch.equal(model(values), before)
    with pytest.raises(RuntimeError, match="stop"), emulated(model, {"inner.0": weight}, "dynamic", {}):
        raise RuntimeError("stop")
    assert model.inner[0] is first


@pytest.mark.parametrize("name", ["inner.1", "inner.2", "inner.9", "nothing"])
def test_what_is_no_such_layer_is_refused(name: str) -> None:
    model = Small()
    with (
        pytest.raises(ValueError, match=rf"{name}: expected a linear layer \[48, 64\]"),
        emulated(model, {name: weight_of("nvfp4")}, "dynamic", {}),
    ):
        pass


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("inf"), float("nan")])
def test_a_static_scale_is_a_finite_positive_number(scale: float | None) -> None:
    with pytest.raises(ValueError, match="finite positive input_scale"):
        Emulated(weight_of("fp8"), "static", scale)


def test_the_self_test_says_what_it_checked() -> None:
    found = self_test({*FORMATS}, CPU)
    assert len(found) == 2 + 3 * len(FORMATS) and "65,280" in found[0].detail and "1016" in found[1].detail


def _ties_up(values: torch.Tensor) -> torch.Tensor:
    found = RIGHT["round"](values)
    return torch.where(values == 2.5, 3.0, found)


def _in_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left @ right.t()).float()


def _swapped(weight: Nvfp4Weight) -> torch.Tensor:
    return RIGHT["decode"](replace(weight, packed=(weight.packed << 4) | (weight.packed >> 4)))


RIGHT: dict[str, Callable[..., Any]] = {
    "round": nvfp4.round_to_e2m1,
    "decode": Nvfp4Weight.in_bf16,
    "forward": Emulated.forward,
}


def _no_bias(self: Emulated, values: torch.Tensor) -> torch.Tensor:
    return RIGHT["forward"](Emulated(self.packed.without_bias(), self.rule, self.input_scale), values)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (nvfp4, "round_to_e2m1", _ties_up),
        (emulation, "multiply", _in_bf16),
        (Nvfp4Weight, "in_bf16", _swapped),
        (Emulated, "forward", _no_bias),
    ],
)
def test_the_self_test_sees_what_is_wrong(
    where: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(BackendError) as failed:
        self_test({"nvfp4"}, CPU)
    assert failed.value.code == "fidelity.self_test" and failed.value.exit_code == 7
