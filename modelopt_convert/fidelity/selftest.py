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


def kernels_agree(algorithms: set[Algorithm], device: torch.device) -> bool:
    """Whether kernels of Triton run on a device, and give the bits that plain torch gives there."""
    due = [one for one in sorted(algorithms) if activations.quantizer_of(one).kernels is not None]
    try:
        with torch.inference_mode():
            return bool(due) and all(_same_bits(one, device) for one in due)
    except Exception:  # a missing compiler shows as any kind of error, and plain torch is right
        return False


def _same_bits(algorithm: Algorithm, device: torch.device) -> bool:
    """Of layers whose activations are usual, empty, lost and clipped, and of all finite BF16 values."""
    weight, values = synthetic(algorithm, device), _values(512, device)
    values[0], values[1], values[2, :16], values[3] = 0.0, values[1] * 1e-7, 0.0, values[3] * 1e5
    rules: tuple[emulation.Rule, ...] = ("static", "dynamic", "weight-only")
    for rule in rules:
        plain, quick = emulation.Emulated(weight, rule, 0.01), emulation.Emulated(weight, rule, 0.01, compiled=True)
        for dtype in (torch.bfloat16, torch.float32):
            if not torch.equal(plain(values.to(dtype)), quick(values.to(dtype))):
                return False
    every = _finite_bf16(device).view(-1, 480)
    plain, quick = (emulation.Emulated(weight, "static", 0.01, compiled=compiled) for compiled in (False, True))
    return torch.equal(plain.quantized(every).operand, quick.quantized(every).operand)


def _finite_bf16(device: torch.device) -> Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def _rounding(device: torch.device) -> Check:
    values = _finite_bf16(device).to(torch.float32)
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
    made = activations.dynamic(algorithm, values)
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
