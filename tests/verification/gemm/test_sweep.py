"""The sweep over M against backends that are wrong at some M or in a few rows of it, and the self-test's own damage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.verification.gemm import probes, selftest
from modelopt_convert.verification.gemm.backends.reference import Reference
from modelopt_convert.verification.gemm.operands import Weight
from modelopt_convert.verification.gemm.probes import (
    ProbeResult,
    identity_probe,
    random_probe,
    sweep_probe,
    sweep_sizes,
)
from modelopt_convert.verification.gemm.selftest import self_test, synthetic

CPU = torch.device("cpu")
SIZES = (1, 8, 17, 32, 33, 64, 128, 512, 1000, 4096, 4608)
ALGORITHMS = ("nvfp4", "fp8")


class Wrong(Reference):
    """Right, but for what is done to the output afterwards."""

    def __init__(self, change: Callable[[Tensor], Tensor | None]) -> None:
        self._change = change

    def gemm(self, prepared: Weight, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        right = super().gemm(prepared, activations, alpha, out)
        changed = self._change(right)
        return right if changed is None else changed


@torch_on_one_thread()
def swept(change: Callable[[Tensor], Tensor | None], algorithm: str = "fp8") -> ProbeResult:
    return sweep_probe(Wrong(change), synthetic(algorithm, CPU), CPU)  # type: ignore[arg-type]


def at(size: int, change: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """Of outputs with this M alone."""

    def apply(output: Tensor) -> None:
        if len(output) == size:
            change(output)

    return apply


def zero(*index: Any) -> Callable[[Tensor], None]:
    return lambda output: output.__setitem__(index, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_right_passes_at_every_size(algorithm: str) -> None:
    result = swept(lambda output: None, algorithm)
    assert (result.status, result.sizes, result.detail) == ("pass", SIZES, "")


@pytest.mark.parametrize("size", SIZES)
def test_zeros_at_one_size_are_seen(size: int) -> None:
    result = swept(at(size, lambda output: output.zero_()))
    assert result.status == "fail" and result.detail.startswith(f"M = {size}, rows "), result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_backend_that_is_right_up_to_512_rows_is_broken(algorithm: str) -> None:
    wrong = Wrong(zero(slice(512, None)))
    result = swept(zero(slice(512, None)), algorithm)
    assert result.status == "fail" and ", rows 512 to " in result.detail
    assert "sweep probe" in (self_test(wrong, algorithm, CPU) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_backend_that_zeroes_the_last_partial_tile_is_broken(algorithm: str) -> None:
    """Of more than 512 rows: 1000 is no multiple of 128."""

    def last_tile(output: Tensor) -> None:
        if len(output) > 512:
            output[len(output) // 128 * 128 :] = 0

    assert swept(last_tile, algorithm).detail.startswith("M = 1000, rows 512 to 999: ")
    assert "sweep probe" in (self_test(Wrong(last_tile), algorithm, CPU) or "")  # type: ignore[arg-type]


def test_rows_of_the_output_before_are_seen() -> None:
    """At M = 4608 only the last 512 rows are written."""
    before: list[Tensor] = []

    def continued(output: Tensor) -> None:
        for earlier in before:
            output[: len(earlier)] = earlier
        before.append(output.clone())

    result = sweep_probe(Wrong(continued), synthetic("fp8", CPU), CPU, sizes=[4096, 4608])  # type: ignore[arg-type]
    assert result.status == "fail" and result.detail.startswith("M = 4608, rows ")


def test_rows_that_are_never_written_are_seen() -> None:
    """A buffer for all M, of which only the first 512 rows are written."""
    buffer: dict[int, Tensor] = {}

    def stale(output: Tensor) -> Tensor:
        columns = output.shape[1]
        kept = buffer.setdefault(columns, torch.cat([output] * (4608 // len(output) + 1))[:4608].clone())
        kept[: min(len(output), 512)] = output[:512]
        return kept[: len(output)].clone()

    assert swept(stale).status == "fail"


@pytest.mark.parametrize(("size", "row"), [(17, 16), (33, 32), (1000, 511), (1000, 999), (4096, 4095), (4608, 777)])
def test_one_row_that_is_off_is_seen(size: int, row: int) -> None:
    """Each by 10%: of a column of hundreds of rows that is nothing, nor of the whole."""
    begin = row // 512 * 512
    result = swept(at(size, lambda output: output[row].mul_(0.9)))
    assert result.status == "fail", result
    assert result.detail.startswith(f"M = {size}, rows {begin} to {min(begin + 512, size) - 1}: "), result


@pytest.mark.parametrize(
    "change", [lambda output: output[:-1], lambda output: output[:1], lambda output: torch.cat((output, output[:1]))]
)
def test_an_output_of_another_shape_is_wrong(change: Callable[[Tensor], Tensor]) -> None:
    result = sweep_probe(Wrong(change), synthetic("fp8", CPU), CPU, sizes=[64])  # type: ignore[arg-type]
    assert result.status == "fail" and "M = 64: the output is" in result.detail


def test_large_layers_are_swept_in_full_on_a_gpu_and_up_to_512_rows_on_a_cpu() -> None:
    flux = (12288, 3072)
    assert sweep_sizes(flux, torch.device("cuda")) == SIZES == sweep_sizes(selftest.SHAPE, CPU)
    assert sweep_sizes(flux, CPU) == SIZES[:8]
    assert sweep_sizes((2048, 2048), CPU) == SIZES[:9]


class Freed(TorchFunctionMode):
    """An allocator: what was filled and dropped is what the next output of its shape gets."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[tuple[int, ...], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.full:
            self.memory[tuple(result.shape)] = result
        return result


@pytest.mark.parametrize("probe", [identity_probe, random_probe, sweep_probe])
def test_memory_with_the_right_output_of_another_backend_is_soiled(probe: Callable[..., ProbeResult]) -> None:
    def unwritten(output: Tensor) -> Tensor:
        return freed.memory.pop(tuple(output.shape), output)

    weight = synthetic("fp8", CPU)
    with Freed() as freed:
        assert probe(Wrong(unwritten), weight, CPU).status == "fail"


def test_a_sweep_that_sees_nothing_past_512_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probes._judge

    def blind(output: Tensor, weight: Any, activations: Any, alpha: float, begin: int, end: int) -> Any:
        return whole(output, weight, activations, alpha, 0, min(end, 512))

    monkeypatch.setattr(probes, "_judge", blind)
    for algorithm in ALGORITHMS:
        found = self_test(Reference(), algorithm, CPU)  # type: ignore[arg-type]
        assert found == "passes an output with the last row of 1000 zero"


@pytest.mark.parametrize("name", selftest._OUTPUTS)
def test_every_damage_of_the_self_test_must_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the damage the output is right: then the self-test says that the sweep let it pass."""
    monkeypatch.setitem(selftest._OUTPUTS, name, (selftest._OUTPUTS[name][0], lambda output: None))
    assert self_test(Reference(), "fp8", CPU) == f"passes an output with {name}"


def test_the_self_test_damages_rows_past_512_alone() -> None:
    assert {size for size, _ in selftest._OUTPUTS.values()} == {1000, 4608}
    kinds = set()
    for size, damage in selftest._OUTPUTS.values():
        before = torch.arange(1.0, size + 1)[:, None].repeat(1, 2)
        damage(after := before.clone())
        changed = (before != after).any(dim=1).nonzero().flatten()
        assert len(changed) and int(changed.min()) >= 512
        kinds.add((size, bool((after[changed] == 0).all())))
    assert kinds == {(size, zeroed) for size in (1000, 4608) for zeroed in (True, False)}
