"""flashinfer itself, on the CPU: its checks, its dispatch, its shuffles. Only what it compiles for a GPU is replaced.

Needs ``flashinfer-python`` and ``apache-tvm-ffi`` and nothing else that is not installed for the tests anyway.
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_standin import SUPPORTED, Simulated, Standin, module_of_kernels
from flashinfer_support import CPU, GEMMS, SHAPES, failing, make_weight
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import swap_nibbles
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4, unswizzle_128x4
from modelopt_convert.verification.gemm.operands import random_activations

CAPABILITIES = (75, 80, 86, 89, 90, 100, 103, 107, 110, 120, 121)
BUILT = (  # whatever is compiled, with what was compiled before in a cache
    "gen_gemm_sm100_module_cutlass_fp4",
    "gen_gemm_sm103_module_cutlass_fp4",
    "gen_gemm_sm120_module_cutlass_fp4",
    "gen_trtllm_gen_gemm_module",
)
CACHED = (
    "get_gemm_sm100_module_cutlass_fp4",
    "get_gemm_sm103_module_cutlass_fp4",
    "get_gemm_sm120_module_cutlass_fp4",
    "_get_trtllm_gemm_module_impl",
)


@pytest.fixture(scope="module")
def flashinfer(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        # It makes a folder for what it compiles as soon as it is imported.
        patch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path_factory.mktemp("flashinfer")))
        return importlib.import_module("flashinfer")


def _part(name: str) -> Any:
    return importlib.import_module(f"flashinfer.{name}")


class _Gpu:
    """flashinfer as if the CPU were a GPU: its own code, over the stand-in's kernels in place of compiled ones."""

    def __init__(self, flashinfer: ModuleType, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.capability = 100
        self._flashinfer, self._patch = flashinfer, patch
        gemm, kernels = _part("gemm.gemm_base"), module_of_kernels()
        spec = SimpleNamespace(build_and_load=lambda: kernels, get_library_paths=lambda: [])
        for name in BUILT:
            patch.setattr(gemm, name, lambda *_, **__: spec)
        for name in ("utils", "gemm.gemm_base"):
            patch.setattr(_part(name), "get_compute_capability", lambda device: divmod(self.capability, 10))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        # Its kernel for this is compiled; it has the same in torch for another use.
        swizzle = _part("diffusion_ops.minimax_h3_fc1_swiglu")._swizzle_sf_128x4
        patch.setattr(_part("quantization.fp4_quantization"), "block_scale_interleave", swizzle)
        self.shuffle_matrix_a = flashinfer.shuffle_matrix_a
        self.shuffle_matrix_sf_a = flashinfer.shuffle_matrix_sf_a

    @property
    def mm_fp4(self) -> Any:
        def record(*arguments: Any, **options: Any) -> Tensor:
            self.calls.append((arguments, options))
            return self._flashinfer.mm_fp4(*arguments, **options)

        record.is_backend_supported = self._flashinfer.mm_fp4.is_backend_supported  # type: ignore[attr-defined]
        return record


@pytest.fixture
def gpu(flashinfer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gpu]:
    caches = [getattr(_part("gemm.gemm_base"), name) for name in CACHED]
    for cache in caches:
        cache.cache_clear()
    yield _Gpu(flashinfer, monkeypatch)
    for cache in caches:
        cache.cache_clear()


def test_stand_in_supports_what_flashinfer_does(flashinfer: ModuleType) -> None:
    for name in (*SUPPORTED, "auto"):
        for capability in CAPABILITIES:
            expected = Standin(capability).mm_fp4.is_backend_supported(name, capability)
            assert flashinfer.mm_fp4.is_backend_supported(name, capability) == expected


@pytest.mark.parametrize("shape", [(128, 4), (256, 32), (384, 6), (128, 5)])
def test_shuffles_are_flashinfers(flashinfer: ModuleType, gpu: _Gpu, shape: tuple[int, int]) -> None:
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert flashinfer.shuffle_matrix_a(values, 128).equal(Standin.shuffle_matrix_a(values, 128))
    assert flashinfer.shuffle_matrix_sf_a(values, 128).equal(Standin.shuffle_matrix_sf_a(values, 128))


@pytest.mark.parametrize("shape", [(128, 4), (200, 5), (1, 1), (300, 33)])
def test_order_of_scales_is_flashinfers(flashinfer: ModuleType, shape: tuple[int, int]) -> None:
    scale = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    swizzled = _part("diffusion_ops.minimax_h3_fc1_swiglu")._swizzle_sf_128x4(scale)
    assert swizzled.equal(swizzle_128x4(scale).flatten())
    for name in ("gemm.gemm_bf16_fp4", "trace.templates.gemm"):
        assert _part(name)._unswizzle_sf_128x4(swizzled, *shape).equal(scale)
    assert unswizzle_128x4(swizzled, *shape).equal(scale)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_requirements_of_flashinfer_are_met(
    gpu: _Gpu, gemm: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _part("gemm.gemm_base")
    monkeypatch.setattr(base, "get_cuda_version", lambda: base._MIN_B12X_CUDA_VERSION)
    monkeypatch.setattr(base, "_check_cute_dsl_availability", lambda: None)
    taken: list[dict[str, Any]] = []

    def take(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        names = ("a_descale", "b_descale", "alpha", "out_dtype")
        taken.append({"a": a, "b": b, **dict(zip(names, rest, strict=True)), **options})
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)

    functions = {"shuffle_matrix_a": gpu.shuffle_matrix_a, "shuffle_matrix_sf_a": gpu.shuffle_matrix_sf_a}
    backend, weight = Simulated(gemm, SimpleNamespace(mm_fp4=take, **functions)), make_weight(*shape)
    out = torch.full((8, shape[0]), torch.nan, dtype=torch.bfloat16)
    backend.gemm(backend.prepare(weight, poison=True), random_activations(weight, 8, CPU), 0.5, out)
    (arguments,) = taken
    assert base._check_mm_fp4_problem_size(**arguments)
    requirements = {
        "trtllm": base._trtllm_gemm_fp4_requirement,
        "cutlass": base._cutlass_gemm_fp4_requirement,
        "b12x": base._b12x_gemm_fp4_requirement,
    }
    for name, requirement in requirements.items():
        if gemm in (name, "auto"):
            assert requirement(**arguments)


@pytest.mark.parametrize(
    ("gemm", "capability"),
    [("trtllm", 100), ("trtllm", 103), ("cutlass", 100), ("cutlass", 103), ("cutlass", 120), ("cutlass", 121)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_operands_through_flashinfers_own_dispatch(
    gpu: _Gpu, gemm: str, capability: int, shape: tuple[int, int]
) -> None:
    gpu.capability = capability
    backend = Simulated(gemm, gpu)
    assert backend.unavailable(CPU) is None
    assert failing(backend, make_weight(*shape)) == set()
    assert all(options["backend"] == gemm for _, options in gpu.calls)
    assert backend.kind == "simulated"


@pytest.mark.parametrize("gemm", ("trtllm", "cutlass"))
def test_swapped_nibbles_through_flashinfers_own_dispatch(gpu: _Gpu, gemm: str) -> None:
    weight = make_weight(256, 128)

    class Mutant(Simulated):
        def prepare(self, _: Any, *, poison: bool) -> Any:
            return super().prepare(replace(weight, packed=swap_nibbles(weight.packed)), poison=poison)

    assert "identity" in failing(Mutant(gemm, gpu), weight)


@pytest.mark.parametrize(("gemm", "capability"), [(name, 90) for name in GEMMS] + [("trtllm", 120), ("b12x", 100)])
def test_flashinfer_refuses_other_capabilities(
    flashinfer: ModuleType, gpu: _Gpu, gemm: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _part("gemm.gemm_base")
    monkeypatch.setattr(base, "get_cuda_version", lambda: base._MIN_B12X_CUDA_VERSION)
    gpu.capability = capability
    backend = Simulated(gemm, gpu)
    # Asked first, so that nothing is built in vain; the call itself says the same.
    assert backend.unavailable(CPU) == (
        f"mm_fp4 has no {gemm} kernel for compute capability {capability // 10}.{capability % 10}"
    )
    with pytest.raises(_part("utils").BackendSupportedError):
        backend._try(CPU)
