"""The table of faults that verify must catch, planted in a checkpoint and in a backend's preparation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import swap, swizzle
from support import Tensors, edit, run_mopt
from verify_support import PACKED, found, statuses

from modelopt_convert.verification.gemm.backends.reference import Reference
from modelopt_convert.verification.gemm.fp8 import Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Activations, Weight
from modelopt_convert.verification.gemm.probes import (
    ProbeResult,
    identity_probe,
    poison_probe,
    random_probe,
    sweep_probe,
)
from modelopt_convert.verification.gemm.selftest import self_test, synthetic

OTHER = "single_transformer_blocks.1.proj_out"  # of the same shape
WEIGHT, SCALE, TENSOR_SCALE = f"{PACKED}.weight", f"{PACKED}.weight_scale", f"{PACKED}.weight_scale_2"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of an 8-bit tensor, to be written to."""
    return tensor.view(torch.uint8)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def bytewise(change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        change(raw(tensor))
        return tensor

    return apply


def zero(index: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return bytewise(lambda found: found.__setitem__(index, 0))


def flip(row: int, column: int, bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(found: torch.Tensor) -> None:
        found[row, column] ^= bit

    return bytewise(apply)


def rolled(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: raw(tensor).roll(1, dims=dim).view(tensor.dtype)


def swizzled(tensor: torch.Tensor) -> torch.Tensor:
    return swizzle(tensor)[: tensor.shape[0], : tensor.shape[1]].contiguous()


def of_another(tensors: Tensors) -> None:
    for role in ("weight_scale", "weight_scale_2"):
        tensors[f"{PACKED}.{role}"] = tensors[f"{OTHER}.{role}"].clone()


# In the module's tensors; what it is, and the level that sees it.
NVFP4_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "nibbles swapped": (put(WEIGHT, swap), "L1"),
    "scales in the other order": (put(SCALE, swizzle), "L1"),
    "scale rows off by one": (put(SCALE, rolled(0)), "L2"),
    "scale columns off by one": (put(SCALE, rolled(1)), "L2"),
    "a block of K dropped": (put(WEIGHT, zero((slice(None), slice(-8, None)))), "L2"),
    "the last two values of K dropped": (put(WEIGHT, zero((slice(None), -1))), "L2"),
    "one scale row zero": (put(SCALE, zero(3)), "L0"),
    "tail rows zero": (put(WEIGHT, zero(slice(-8, None))), "L2"),
    "K shifted by one byte": (put(WEIGHT, rolled(1)), "L2"),
    "global scale 5% off": (put(TENSOR_SCALE, lambda scale: scale * 1.05), "L2"),
    "one bit of a scale flipped": (put(SCALE, flip(40, 7, 0x01)), "L2"),
    "one sign flipped": (put(WEIGHT, flip(41, 9, 0x08)), "L2"),
    "another module's scales": (of_another, "L2"),
    "bias forgotten": (lambda tensors: tensors.pop(f"{PACKED}.bias"), "L2"),
}
FP8_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a block of K dropped": (put(WEIGHT, zero((slice(None), slice(-16, None)))), "L2"),
    "the last two values of K dropped": (put(WEIGHT, zero((slice(None), slice(-2, None)))), "L2"),
    "tail rows zero": (put(WEIGHT, zero(slice(-8, None))), "L2"),
    "K shifted by one": (put(WEIGHT, rolled(1)), "L2"),
    "scale 5% off": (put(SCALE, lambda scale: scale * 1.05), "L2"),
    "one sign flipped": (put(WEIGHT, flip(41, 9, 0x80)), "L2"),
    "a code is NaN": (put(WEIGHT, bytewise(lambda found: found.__setitem__((41, 9), 0x7F))), "L0"),
    "another module's scale": (lambda tensors: tensors.update({SCALE: tensors[f"{OTHER}.weight_scale"].clone()}), "L2"),
    "bias forgotten": (lambda tensors: tensors.pop(f"{PACKED}.bias"), "L2"),
}
CASES = [("nvfp4", name) for name in NVFP4_FAULTS] + [("fp8", name) for name in FP8_FAULTS]


@pytest.mark.parametrize(("algorithm", "name"), CASES)
def test_a_fault_in_a_checkpoint_is_seen_by_the_base(
    algorithm: str, name: str, exports: Path, base: Path, tmp_path: Path
) -> None:
    fault, level = {"nvfp4": NVFP4_FAULTS, "fp8": FP8_FAULTS}[algorithm][name]
    damaged = edit(exports / algorithm, tmp_path / "damaged", fault)
    outcome = run_mopt("verify", damaged, "--base", base, "--sample", "all", "--device", "cpu")
    assert outcome.exit_code == 1 and outcome.error_code == "check.verify", outcome.stderr
    failed = next(one for one in found(outcome)["levels"] if one["level"] == level)
    assert failed["status"] == "fail" and any(PACKED in words for words in failed["failures"]), statuses(outcome)
    others = [words for one in found(outcome)["levels"] for words in one["failures"] if PACKED not in words]
    assert [words for words in others if not words.startswith("sglang@")] == []


class Preparing(Reference):
    """The reference behind a preparation or an epilogue that is wrong."""

    def __init__(
        self, change: Callable[[Weight], Weight], alpha: Callable[[float], float], with_bias: bool = True
    ) -> None:
        self._change, self._alpha, self._with_bias = change, alpha, with_bias

    def prepare(self, weight: Weight, *, poison: bool) -> Weight:
        changed = self._change(weight)
        return changed if self._with_bias else replace(changed, bias=None)

    def gemm(self, prepared: Weight, activations: Activations, alpha: float, out: torch.Tensor | None) -> torch.Tensor:
        return super().gemm(prepared, activations, self._alpha(alpha), out)


def codes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weight], Weight]:
    def apply(weight: Weight) -> Weight:
        if isinstance(weight, Nvfp4Weight):
            return replace(weight, packed=change(weight.packed.clone()))
        return replace(weight, codes=change(weight.codes.clone()))

    return apply


def scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weight], Weight]:
    def apply(weight: Weight) -> Weight:
        assert isinstance(weight, Nvfp4Weight)
        return replace(weight, scale=change(weight.scale.clone()))

    return apply


def reversed_rows(tensor: torch.Tensor) -> torch.Tensor:
    return raw(tensor).flip(0).view(tensor.dtype)


def same(value: Any) -> Any:
    return value


# The backend, and the probes that see it: identity, random, sweep, poison.
PREPARATIONS: dict[str, tuple[Preparing, str]] = {
    "nibbles swapped": (Preparing(codes(swap), same), "irsp"),
    "scales in the other order": (Preparing(scales(swizzled), same), "irsp"),
    "scale rows off by one": (Preparing(scales(rolled(0)), same), "irsp"),
    "scale columns off by one": (Preparing(scales(rolled(1)), same), "irsp"),
    "a block of K dropped": (Preparing(codes(zero((slice(None), slice(-8, None)))), same), "irsp"),
    "the last two values of K dropped": (Preparing(codes(zero((slice(None), -1))), same), "irsp"),
    "one scale row zero": (Preparing(scales(zero(3)), same), "irsp"),
    "tail rows zero": (Preparing(codes(zero(slice(-8, None))), same), "irsp"),
    "one bit of a scale flipped": (Preparing(scales(flip(40, 7, 0x01)), same), "i"),
    "one sign flipped": (Preparing(codes(flip(41, 9, 0x08)), same), "i"),
    "another module's scales": (Preparing(scales(reversed_rows), same), "irsp"),
    "global scale 5% off": (Preparing(same, lambda alpha: alpha * 1.05), "irsp"),
    "alpha forgotten": (Preparing(same, lambda alpha: 1.0), "rsp"),
    "bias forgotten": (Preparing(same, same, with_bias=False), "rsp"),
}
PROBES: dict[str, Callable[..., ProbeResult]] = {
    "i": identity_probe,
    "r": random_probe,
    "s": sweep_probe,
    "p": poison_probe,
}
CPU = torch.device("cpu")
# What the random probe measures, where one number names the fault: (number, from, to).
FIGURES = {
    "nibbles swapped": ("calc_diff", 0.5, 1.5),
    "scales in the other order": ("calc_diff", 0.02, 0.9),
    "scale rows off by one": ("calc_diff", 0.02, 0.9),
    "scale columns off by one": ("calc_diff", 0.02, 0.9),
    "a block of K dropped": ("worst_column", 0.05, 1.0),
    "the last two values of K dropped": ("worst_column", 0.03, 1.0),
    "one scale row zero": ("worst_column", 0.9, 1.1),
    "tail rows zero": ("worst_column", 0.9, 1.1),
    "global scale 5% off": ("gain", 1.04, 1.06),
    "alpha forgotten": ("gain", 10.0, 1e12),
    "bias forgotten": ("worst_column", 0.03, 1.1),
    "another module's scales": ("calc_diff", 0.02, 0.9),
    "one bit of a scale flipped": ("calc_diff", 0.0, 1e-5),  # not seen by it
    "one sign flipped": ("calc_diff", 0.0, 1e-5),
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_a_fault_in_a_preparation_is_seen_by_the_probes(name: str) -> None:
    backend, expected = PREPARATIONS[name]
    weight = synthetic("nvfp4", CPU)
    results = {key: probe(backend, weight, CPU) for key, probe in PROBES.items()}
    failed = {key for key, result in results.items() if result.status == "fail"}
    assert set(expected) <= failed, results
    number, low, high = FIGURES[name]
    assert low <= getattr(results["r"].metrics, number) <= high, results["r"]
    if "i" in failed and name != "global scale 5% off":
        assert results["i"].rows and results["i"].columns
    if name == "one scale row zero":
        assert results["i"].rows == (3,)
    if name == "one sign flipped":
        assert results["i"].rows == (41,) and results["i"].columns == (18,)
    assert self_test(backend, "nvfp4", CPU) is not None


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_what_is_right_passes_every_probe(algorithm: str) -> None:
    weight = synthetic(algorithm, CPU)
    assert {probe(Reference(), weight, CPU).status for probe in PROBES.values()} == {"pass"}
    assert self_test(Reference(), algorithm, CPU) is None


def test_a_backend_that_leaves_its_output_unwritten_is_broken() -> None:
    """As flashinfer's kernels below compute capability 10.0, or one that wrote zeros at some M."""

    class Unwritten(Reference):
        def gemm(
            self, prepared: Weight, activations: Activations, alpha: float, out: torch.Tensor | None
        ) -> torch.Tensor:
            right = super().gemm(prepared, activations, alpha, out)
            return right if out is None else out

    class ZeroAt(Reference):
        def gemm(
            self, prepared: Weight, activations: Activations, alpha: float, out: torch.Tensor | None
        ) -> torch.Tensor:
            right = super().gemm(prepared, activations, alpha, out)
            return right * 0 if len(right) == 128 else right

    for algorithm in ("nvfp4", "fp8"):
        assert "poison" in (self_test(Unwritten(), algorithm, CPU) or "")
        assert "sweep" in (self_test(ZeroAt(), algorithm, CPU) or "")


def test_a_backend_that_ignores_the_weight_is_broken() -> None:
    """It passes what is right and does not see what is wrong: no verdict of its own would count."""

    class Knows(Reference):
        def prepare(self, weight: Weight, *, poison: bool) -> Weight:
            right = synthetic("fp8" if isinstance(weight, Fp8Weight) else "nvfp4", CPU)
            return right if weight.bias is not None else replace(right, bias=None)

    for algorithm in ("nvfp4", "fp8"):
        assert (self_test(Knows(), algorithm, CPU) or "").startswith("passes a layer with")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["quantization_config"]["ignore"].append(PACKED),
        lambda config: config["quantization_config"]["ignore"].append("*"),
        lambda config: config.pop("quantization_config"),
        lambda config: config.update(quantization_config=[]),
        lambda config: config["quantization_config"].update(quant_algo="NVFP4"),
        lambda config: config["quantization_config"].update(quant_method="gptq"),
    ],
)
def test_a_config_that_engines_would_load_wrong_by(
    change: Callable[[dict[str, Any]], object], exports: Path, base: Path, tmp_path: Path
) -> None:
    """FP8 is loaded by config.json alone: codes on the `ignore` list are read as plain weights."""
    damaged = edit(exports / "fp8", tmp_path / "damaged", change_config=change)
    outcome = run_mopt("verify", damaged, "--base", base, "--device", "cpu")
    assert outcome.exit_code == 1 and statuses(outcome)["L0"] == "fail", outcome.stderr


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_a_weight_that_is_cut_or_without_counterpart_fails(
    algorithm: str, exports: Path, base: Path, tmp_path: Path
) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[WEIGHT] = tensors[WEIGHT][:17].clone()
        if tensors[SCALE].ndim:
            tensors[SCALE] = tensors[SCALE][:17].clone()

    damaged = edit(exports / algorithm, tmp_path / "cut", cut)
    outcome = run_mopt("verify", damaged, "--base", base, "--device", "cpu")
    assert outcome.exit_code == 1 and PACKED in outcome.message
    bare = edit(base, tmp_path / "bare", lambda tensors: tensors.pop(WEIGHT))
    outcome = run_mopt("verify", exports / algorithm, "--base", bare, "--device", "cpu")
    assert outcome.exit_code == 1 and PACKED in outcome.message


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite_is_refused(
    algorithm: str, value: float, exports: Path, base: Path, tmp_path: Path
) -> None:
    spoil = put(f"{PACKED}.bias", lambda bias: bias.fill_(value))
    damaged = edit(exports / algorithm, tmp_path / "damaged", spoil)
    outcome = run_mopt("verify", damaged, "--base", base, "--device", "cpu")
    assert outcome.exit_code == 1 and statuses(outcome)["L0"] == "fail"
    command = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}[algorithm]
    where = ("--preset", "flux1-dev", "--export", damaged, "--base", base, "--output", tmp_path / "out")
    outcome = run_mopt(command, *where)
    assert outcome.exit_code == 3 and outcome.error_code == "export.not_finite"


def test_negative_scales_fail(exports: Path, base: Path, tmp_path: Path) -> None:
    """Kernels read block scales without a sign."""
    negative = put(SCALE, bytewise(lambda found: found.__ior__(0x80)))
    flipped = put(WEIGHT, bytewise(lambda found: found.__ixor__(0x88)))

    def both(tensors: Tensors) -> None:
        negative(tensors)
        flipped(tensors)

    damaged = edit(exports / "nvfp4", tmp_path / "damaged", both)
    outcome = run_mopt("verify", damaged, "--base", base, "--device", "cpu")
    assert outcome.exit_code == 1 and statuses(outcome)["L0"] == "fail"


ONE_FAULT: dict[str, dict[str, Callable[[Tensors], object]]] = {
    "nvfp4": {
        "no block scales": lambda tensors: tensors.pop(SCALE),
        "a block scale is NaN": put(SCALE, bytewise(lambda one: one[0].fill_(0x7F))),
        "a block scale is negative": put(SCALE, bytewise(lambda one: one[0].fill_(0xB0))),
        "a scale of NaN": put(TENSOR_SCALE, lambda one: one * float("nan")),
        "scales of another shape": put(SCALE, lambda one: one.t().contiguous()),
        "an input scale of zero": put(f"{PACKED}.input_scale", torch.zeros_like),
        "a plain value is NaN": put("proj_out.bias", lambda one: one * float("nan")),
    },
    "fp8": {
        "no scale": lambda tensors: tensors.pop(SCALE),
        "a scale of NaN": put(SCALE, lambda one: one * float("nan")),
        "a negative scale": put(SCALE, lambda one: -one),
        "a scale of another shape": put(SCALE, lambda one: one.reshape(1, 1)),
        "a code is NaN": put(WEIGHT, bytewise(lambda one: one[0, :1].fill_(0x7F))),
        "an input scale of NaN": put(f"{PACKED}.input_scale", lambda one: one * float("nan")),
    },
}


@pytest.mark.parametrize(("algorithm", "kind"), [(one, kind) for one, kinds in ONE_FAULT.items() for kind in kinds])
def test_one_fault_is_one_line(algorithm: str, kind: str, exports: Path, tmp_path: Path) -> None:
    """What follows from it is not told besides, by whichever level: a module is broken once."""
    folder = edit(exports / algorithm, tmp_path / "out", ONE_FAULT[algorithm][kind])
    for more in ([], ["--base", exports / "base", "--sample", "1"]):
        outcome = run_mopt("verify", folder, *more)
        if not more and kind == "a plain value is NaN":
            continue  # without a base it is not read
        assert outcome.exit_code == 1, outcome.stderr
        lines = [one for level in found(outcome)["levels"] for one in level["failures"] + level["warnings"]]
        assert len(lines) == 1, lines
        assert PACKED in lines[0] or "proj_out.bias" in lines[0]
