"""The operands of flashinfer's kernels, read back by a strict stand-in; and mutants, each of which must be seen."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_standin import Simulated, Standin
from flashinfer_support import CPU, GEMMS, SHAPES, failing, is_seen, make_weight
from sglang_fp4 import process_backend_weights
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import swap_nibbles
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4, unswizzle_128x4
from modelopt_convert.verification.gemm.backends import BACKENDS
from modelopt_convert.verification.gemm.backends.flashinfer_fp4 import FlashinferFp4, Prepared
from modelopt_convert.verification.gemm.operands import random_activations
from modelopt_convert.verification.gemm.selftest import self_test


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_right_operands_pass_every_probe(gemm: str, shape: tuple[int, int]) -> None:
    assert failing(Simulated(gemm), make_weight(*shape)) == set()


@pytest.mark.parametrize("gemm", GEMMS)
def test_self_test_trusts_the_stand_in(gemm: str) -> None:
    assert self_test(Simulated(gemm), "nvfp4", CPU) is None


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_operands_are_sglangs_byte_for_byte(gemm: str, shape: tuple[int, int]) -> None:
    weight = make_weight(*shape)
    prepared = Simulated(gemm).prepare(weight, poison=False)
    packed, scale, extra = process_backend_weights(weight.packed, weight.scale, gemm, Standin)
    assert prepared.packed.equal(packed)
    assert prepared.scale.dtype == scale.dtype == torch.float8_e4m3fn
    assert prepared.scale.view(torch.uint8).equal(scale.view(torch.uint8))
    assert prepared.packed.shape[1] - weight.packed.shape[1] == extra


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_poison_lies_in_rows_that_reach_no_output(gemm: str, shape: tuple[int, int]) -> None:
    weight = make_weight(*shape)
    clean, poisoned = (Simulated(gemm).prepare(weight, poison=poison) for poison in (False, True))
    # Undone with rows that the shuffle leaves within their block of 32.
    before, after = (unswizzle_128x4(p.scale.view(torch.uint8), *p.scale.shape) for p in (clean, poisoned))
    changed = before != after
    assert changed.sum() == (before.shape[0] - shape[0]) * before.shape[1]
    assert (after[changed] == 0x7F).all()
    assert clean.packed.equal(poisoned.packed)


def test_what_is_simulated_is_never_native() -> None:
    registered = [backend for backend in BACKENDS if isinstance(backend, FlashinferFp4)]
    for gemm, backend in zip(GEMMS, registered, strict=True):
        assert (backend.name, backend.kind) == (f"flashinfer-{gemm}", "native")
        assert type(backend) is FlashinferFp4
        simulated = Simulated(gemm)
        assert simulated.kind == "simulated"
        with pytest.raises(AttributeError):
            simulated.kind = "native"  # type: ignore[misc]


def test_output_is_written_in_place_where_nothing_is_padded() -> None:
    backend, weight = Simulated("cutlass"), replace(make_weight(256, 128), bias=None)
    out = torch.full((8, 256), torch.nan, dtype=torch.bfloat16)
    activations = random_activations(weight, 8, CPU)
    result = backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, out)
    assert result.data_ptr() == out.data_ptr() and bool(out.isfinite().all())


@pytest.mark.parametrize(("capability", "chosen"), [(100, "cudnn"), (103, "cutlass"), (120, "b12x"), (121, "cudnn")])
def test_auto_is_never_trtllm(capability: int, chosen: str) -> None:
    standin = Standin(capability)
    assert failing(Simulated("auto", standin), make_weight(200, 80)) == set()
    assert set(standin.calls) == {chosen}


# Mutants. Each takes the name of a kernel and gives a backend that prepares or calls wrongly.

Factory = Callable[[str], Any]


def _standin(gemm: str) -> Standin:
    return Standin(120 if gemm == "b12x" else 100)


def prepared_wrong(change: Callable[[Prepared], Prepared]) -> Factory:
    class Mutant(Simulated):
        def prepare(self, weight: Any, *, poison: bool) -> Prepared:
            return change(super().prepare(weight, poison=poison))

    return Mutant


def called_wrong(change: Callable[[list[Any]], None]) -> Factory:
    def make(gemm: str) -> Simulated:
        real = _standin(gemm)

        def mm_fp4(*arguments: Any, **options: Any) -> Tensor:
            changed = list(arguments)
            change(changed)
            return real.mm_fp4(*changed, **options)

        functions = {"shuffle_matrix_a": real.shuffle_matrix_a, "shuffle_matrix_sf_a": real.shuffle_matrix_sf_a}
        return Simulated(gemm, SimpleNamespace(mm_fp4=mm_fp4, **functions))

    return make


def shuffled_wrong(**functions: Callable[[Tensor, int], Tensor]) -> Factory:
    def make(gemm: str) -> Simulated:
        real = _standin(gemm)
        right = {"shuffle_matrix_a": real.shuffle_matrix_a, "shuffle_matrix_sf_a": real.shuffle_matrix_sf_a}
        return Simulated(gemm, SimpleNamespace(mm_fp4=real.mm_fp4, **{**right, **functions}))

    return make


def _scale(change: Callable[[Tensor], Tensor]) -> Factory:
    """Change the scales as they lie in memory."""

    def changed(prepared: Prepared) -> Prepared:
        raw = change(prepared.scale.view(torch.uint8)).reshape(prepared.scale.shape)
        return replace(prepared, scale=raw.view(torch.float8_e4m3fn))

    return prepared_wrong(changed)


def _linear_scale(change: Callable[[Tensor], Tensor]) -> Factory:
    """Change the scales in row-major order."""
    return _scale(lambda raw: swizzle_128x4(change(unswizzle_128x4(raw, *raw.shape))))


def _item(index: int, change: Callable[[Tensor], Tensor]) -> Factory:
    def changed(arguments: list[Any]) -> None:
        arguments[index] = change(arguments[index])

    return called_wrong(changed)


def _nan_columns(raw: Tensor) -> Tensor:
    """K = 80 or 208: the last column of scales belongs to no block of K, nor of K padded."""
    raw = raw.clone()
    raw[:, -1] = 0x7F
    return raw


def _row_zero(raw: Tensor) -> Tensor:
    raw = raw.clone()
    raw[5] = 0
    return raw


def _unswizzled(scale: Tensor) -> Tensor:
    raw = scale.view(torch.uint8)
    return unswizzle_128x4(raw, *raw.shape).view(torch.float8_e4m3fn)


def _unshuffled(tensor: Tensor) -> Tensor:
    row = torch.arange(tensor.shape[0])
    return tensor[row // 32 * 32 + row % 4 * 8 + row % 32 // 4]


class _SlicedFromTheEnd(Simulated):
    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        whole = replace(prepared, num_rows=prepared.packed.shape[0], bias=None)
        result = super().gemm(whole, activations, alpha, None)[:, -prepared.num_rows :]
        return result if prepared.bias is None else result + prepared.bias


class _BiasTwice(Simulated):
    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        result = super().gemm(prepared, activations, alpha, out)
        return result if prepared.bias is None else result + prepared.bias


MUTANTS: dict[str, Factory] = {
    "nibbles swapped": prepared_wrong(lambda p: replace(p, packed=swap_nibbles(p.packed))),
    "nibbles of activations swapped": _item(0, swap_nibbles),
    "scales left linear": _scale(lambda raw: unswizzle_128x4(raw, *raw.shape)),
    "scales swizzled twice": _scale(swizzle_128x4),
    "scales of activations left linear": _item(2, _unswizzled),
    "scales transposed": _scale(lambda raw: raw.T.contiguous()),
    "scales a row off": _linear_scale(lambda raw: raw.roll(1, 0)),
    "scales a column off": _linear_scale(lambda raw: raw.roll(1, 1)),
    "a row of scales zero": _linear_scale(_row_zero),
    "weight a row off": prepared_wrong(lambda p: replace(p, packed=p.packed.roll(1, 0))),
    "weight row-major": _item(1, lambda b: b.contiguous()),
    "scales not as a view": _item(3, lambda scale: scale.contiguous()),
    "alpha forgotten": _item(4, torch.ones_like),
    "alpha of float64": _item(4, lambda alpha: alpha.double()),
    "alpha left out": called_wrong(lambda arguments: arguments.__setitem__(4, None)),
    "bias forgotten": prepared_wrong(lambda p: replace(p, bias=None)),
    "bias twice": _BiasTwice,
}
ONLY_TRTLLM: dict[str, Factory] = {
    "weight not shuffled": shuffled_wrong(shuffle_matrix_a=lambda tensor, tile: tensor),
    "scales not shuffled": shuffled_wrong(shuffle_matrix_sf_a=lambda tensor, tile: swizzle_128x4(tensor)),
    "neither shuffled": shuffled_wrong(
        shuffle_matrix_a=lambda tensor, tile: tensor, shuffle_matrix_sf_a=lambda tensor, tile: swizzle_128x4(tensor)
    ),
    "scales shuffled after the swizzle": shuffled_wrong(
        shuffle_matrix_sf_a=lambda tensor, tile: Standin.shuffle_matrix_a(swizzle_128x4(tensor), tile)
    ),
    "shuffled the other way": shuffled_wrong(shuffle_matrix_a=lambda tensor, tile: _unshuffled(tensor)),
}
# For N = 200 and K = 80: no multiple of 32, and K/16 none of 4.
ONLY_PADDED: dict[str, Factory] = {
    "columns beyond K/16 not zero": _linear_scale(_nan_columns),
    "scales padded at the end only": prepared_wrong(
        lambda p: replace(p, scale=_padded_at_the_end(p.scale, 200, 5)),
    ),
    "K padded on the left": prepared_wrong(lambda p: replace(p, packed=p.packed.roll(p.packed.shape[1] - 40, 1))),
    "activations not padded": _item(0, lambda a: a[:, :40].contiguous()),
    "sliced from the end": _SlicedFromTheEnd,
}


def _padded_at_the_end(scale: Tensor, rows: int, columns: int) -> Tensor:
    raw = scale.view(torch.uint8)
    linear = unswizzle_128x4(raw, *raw.shape)
    wrong = torch.zeros_like(linear)
    wrong.view(-1)[: rows * columns] = linear[:rows, :columns].reshape(-1)
    return swizzle_128x4(wrong).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("shape", [(256, 128), (200, 80)])
def test_mutant_is_seen(name: str, gemm: str, shape: tuple[int, int]) -> None:
    assert is_seen(MUTANTS[name](gemm), make_weight(*shape))


@pytest.mark.parametrize("name", ONLY_TRTLLM)
@pytest.mark.parametrize("shape", [(256, 128), (200, 80)])
def test_mutant_of_the_shuffle_is_seen(name: str, shape: tuple[int, int]) -> None:
    assert "identity" in failing(ONLY_TRTLLM[name]("trtllm"), make_weight(*shape))


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", ONLY_PADDED)
def test_mutant_of_the_padding_is_seen(name: str, gemm: str) -> None:
    assert is_seen(ONLY_PADDED[name](gemm), make_weight(200, 80))


@pytest.mark.parametrize("gemm", ("cutlass", "cudnn", "b12x"))
def test_trtllms_operands_are_wrong_elsewhere(gemm: str) -> None:
    class Mutant(Simulated):
        def prepare(self, weight: Any, *, poison: bool) -> Prepared:
            return Simulated("trtllm").prepare(weight, poison=poison)

    assert "identity" in failing(Mutant(gemm), make_weight(256, 128))


def test_rows_left_unpadded_are_refused() -> None:
    cut = prepared_wrong(lambda p: replace(p, packed=p.packed[: p.num_rows].contiguous()))
    assert "refused" in failing(cut("cutlass"), make_weight(200, 80))
    assert "refused" in failing(cut("trtllm"), make_weight(200, 80))


# Faults of a kernel, not of us: which probe sees them.


@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        ("zeros at 32", {"sweep"}),
        ("unwritten", {"identity", "random", "sweep", "poison"}),
        ("rows leak", {"poison"}),
    ],
)
def test_fault_of_a_kernel_is_seen(fault: str, seen_by: set[str]) -> None:
    assert failing(Simulated("cutlass", Standin(100, frozenset({fault}))), make_weight(256, 128)) == seen_by


# What can be said about a backend that does not run.


class _Raising(Simulated):
    def __init__(self, error: Exception) -> None:
        super().__init__("cutlass")
        self._error = error

    def _library(self) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ModuleNotFoundError("No module named 'flashinfer'", name="flashinfer"),
            "flashinfer is not installed: pip install flashinfer-python",
        ),
        (
            ModuleNotFoundError("No module named 'tvm_ffi'", name="tvm_ffi"),
            "flashinfer cannot be imported: ModuleNotFoundError: No module named 'tvm_ffi'",
        ),
        (OSError("libcudart.so.13: gone\nmore"), "flashinfer cannot be imported: OSError: libcudart.so.13: gone"),
    ],
)
def test_unavailable_says_why_it_does_not_import(error: Exception, reason: str) -> None:
    assert _Raising(error).unavailable(CPU) == reason


def test_unavailable_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without an import."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    for gemm in GEMMS:
        assert FlashinferFp4(gemm).unavailable(CPU) == "needs a CUDA device"


@pytest.mark.parametrize(
    ("gemm", "capability", "runs"),
    [(gemm, 90, False) for gemm in GEMMS]
    + [
        ("trtllm", 120, False),
        ("b12x", 100, False),
        ("auto", 121, True),
        ("trtllm", 103, True),
        ("cutlass", 110, True),
    ],
)
def test_unavailable_by_capability(gemm: str, capability: int, runs: bool) -> None:
    reason = f"mm_fp4 has no {gemm} kernel for compute capability {capability // 10}.{capability % 10}"
    assert Simulated(gemm, Standin(capability)).unavailable(CPU) == (None if runs else reason)


def test_unavailable_if_the_small_call_fails() -> None:
    def refuse(arguments: list[Any]) -> None:
        raise RuntimeError("nvcc not found\nat line 7")

    backend = called_wrong(refuse)("cutlass")
    backend.library.mm_fp4.is_backend_supported = lambda name, capability: True
    assert backend.unavailable(CPU) == "a small mm_fp4 call fails: RuntimeError: nvcc not found"
