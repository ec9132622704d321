"""Is the emulation right where it runs? Each check has an answer that was found in another way."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.fidelity import activations, emulation
from modelopt_convert.fidelity.activations import nvfp4
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.nvfp4.codes import E2M1_VALUES, decode_e2m1, encode_e2m1
from modelopt_convert.run.errors import BackendError, first_line
from modelopt_convert.verification.gemm.operands import random_values
from modelopt_convert.verification.gemm.selftest import synthetic

_ROWS = 96
_UNIT = 2.0**-24  # of float32


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: What is checked.
        detail: Against what, and how many values.
    """

    name: str
    detail: str


def self_test(algorithms: set[Algorithm], device: torch.device) -> list[Check]:
    """Check the emulation on a device.

    Args:
        algorithms: The formats that will be emulated.
        device: Where.

    Returns:
        What was checked.

    Raises:
        BackendError: ``fidelity.self_test``.
    """
    found: list[Check] = []
    checks: list[Callable[[torch.device], Check]] = [_rounding, _products]
    with torch.inference_mode():
        try:
            found += [check(device) for check in checks]
            for algorithm in sorted(algorithms):
                found += _layer(algorithm, device)
        except (RuntimeError, TypeError, AssertionError) as error:  # torch is too old for this device, or wrong on it
            raise BackendError(
                f"the emulation fails its self-test on {device}: {first_line(error)}",
                code="fidelity.self_test",
                hint="update torch, or give --device cpu",
            ) from error
    return found


def can_compile(algorithms: set[Algorithm], device: torch.device) -> bool:
    """Whether ``torch.compile`` makes quantizers of activations that give the same bits on a device."""
    try:
        with torch.inference_mode():
            return all(_compiled_equal(algorithm, device) for algorithm in algorithms)
    except Exception:  # a missing compiler shows as any kind of error, and the plain code is right
        return False


def _compiled_equal(algorithm: Algorithm, device: torch.device) -> bool:
    weight, values = synthetic(algorithm, device), _values(512, device)
    for rule in ("static", "dynamic"):
        plain = emulation.Emulated(weight, rule, 0.01).quantized(values)
        quick = emulation.Emulated(weight, rule, 0.01, compiled=True).quantized(values)
        if not torch.equal(plain.operand, quick.operand) or not torch.equal(plain.scale, quick.scale):
            return False
    return True


def _rounding(device: torch.device) -> Check:
    values = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()].to(torch.float32)
    _require(torch.equal(nvfp4.round_to_e2m1(values), decode_e2m1(encode_e2m1(values))), "E2M1 of BF16 values differs")
    return Check("E2M1 rounding", f"ModelOpt's codes, all {len(values):,} finite BF16 values")


def _products(device: torch.device) -> Check:
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=device)
    scales = torch.arange(127, dtype=torch.int32, device=device).to(torch.uint8).view(torch.float8_e4m3fn)
    exact = codes[:, None] * scales.to(torch.float64)
    rounded = codes.to(torch.bfloat16)[:, None] * scales.to(torch.bfloat16)
    _require(torch.equal(rounded.to(torch.float64), exact), "code times block scale is not exact in BF16")
    return Check("code times block scale in BF16", f"float64, all {exact.numel()} products")


def _layer(algorithm: Algorithm, device: torch.device) -> list[Check]:
    """A weight's decoding, the GEMM, and a whole layer with its bias, against float64."""
    weight = synthetic(algorithm, device)
    exact = weight.decode(0, weight.shape[0])
    _require(torch.equal(weight.in_bf16().to(torch.float64), exact), f"{algorithm} weights are decoded otherwise")
    values = _values(weight.shape[1], device)
    made = activations.quantizer_of(algorithm).dynamic(values)
    operand = made.operand.to(torch.float64)
    product, found = operand @ exact.t(), emulation.multiply(made.operand, weight.in_bf16())
    # The order of additions is the device's own: K roundings of float32 at most.
    bound = weight.shape[1] * _UNIT * (operand.abs() @ exact.abs().t())
    _require(found.dtype == torch.float32, "the GEMM does not return float32")
    _require(bool(((found.to(torch.float64) - product).abs() <= bound).all()), "the GEMM is not that of float64")
    assert weight.bias is not None
    whole = (product * made.scale.to(torch.float64) * weight.tensor_scale).to(torch.bfloat16) + weight.bias
    layer = emulation.Emulated(weight, "dynamic")(values).to(torch.float64)
    slack = whole.to(torch.float64).abs().clamp(min=float(whole.abs().amax()) * 2.0**-8) * 2.0**-6
    _require(bool(((layer - whole.to(torch.float64)).abs() <= slack).all()), "a whole layer is not that of float64")
    numbers = f"float64, {list(weight.shape)}"
    return [
        Check(f"{algorithm} weights decoded", numbers),
        Check(f"{algorithm} GEMM added in float32", numbers),
        Check(f"{algorithm} layer with bias", numbers),
    ]


def _values(columns: int, device: torch.device) -> Tensor:
    return random_values(_ROWS, columns).to(device, torch.bfloat16)


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)
