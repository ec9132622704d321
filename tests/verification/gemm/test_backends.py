"""GEMM backends without a GPU: torch's FP8 for real, BF16 emulation in float32, the others against stand-ins."""

import sys
from dataclasses import replace
from typing import Any

import gpu_standins
import pytest
import torch
from torch import Tensor

from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4, quantize_nvfp4, shared_global_scale
from modelopt_convert.formats.nvfp4.scales import unswizzle_128x4
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.verification.gemm.backends import sgl_kernel, torch_scaled
from modelopt_convert.verification.gemm.backends.bf16 import Bf16
from modelopt_convert.verification.gemm.backends.padding import (
    deliver,
    epilogue,
    kernel_scales,
    pad_bytes,
    strided_scales,
)
from modelopt_convert.verification.gemm.backends.reference import Reference, exact
from modelopt_convert.verification.gemm.backends.sgl_kernel import SglFp8, SglNvfp4
from modelopt_convert.verification.gemm.backends.torch_scaled import TorchFp8, TorchNvfp4, refusal
from modelopt_convert.verification.gemm.fp8 import Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight, decode_nvfp4
from modelopt_convert.verification.gemm.operands import Weight, random_activations
from modelopt_convert.verification.gemm.probes import identity_probe, poison_probe, random_probe
from modelopt_convert.verification.gemm.selftest import self_test

CPU = torch.device("cpu")
ODD = ((16, 16), (150, 80), (200, 272))
PAIRS = [(Bf16(), "nvfp4"), (Bf16(), "fp8"), (TorchFp8(), "fp8"), (Reference(), "nvfp4"), (Reference(), "fp8")]
STANDINS = [(TorchNvfp4(), "nvfp4"), (SglNvfp4(), "nvfp4"), (SglFp8(), "fp8")]


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and sgl_kernel as on a Blackwell GPU."""
    module = gpu_standins.sgl_kernel("fp8_scaled_mm", "cutlass_scaled_fp4_mm")
    monkeypatch.setitem(sys.modules, "sgl_kernel", module)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", gpu_standins.scaled_mm)


def layer(algorithm: str, rows: int, columns: int) -> Weight:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    bias = torch.randn(rows, generator=generator).to(torch.bfloat16)
    if algorithm == "fp8":
        scale = values.abs().amax().to(torch.float32) / 448
        return Fp8Weight(quantize_fp8(values, scale), float(scale), bias)
    tensor_scale = shared_global_scale([values])
    return Nvfp4Weight(*quantize_nvfp4(values, tensor_scale), float(tensor_scale), bias)


@pytest.mark.parametrize(("backend", "algorithm"), PAIRS)
def test_a_backend_passes_its_self_test(backend: Any, algorithm: str) -> None:
    assert self_test(backend, algorithm, CPU) is None


@pytest.mark.parametrize(("backend", "algorithm"), STANDINS)
@pytest.mark.usefixtures("standins")
def test_operands_are_what_the_kernels_ask_for(backend: Any, algorithm: str) -> None:
    assert self_test(backend, algorithm, CPU) is None


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize(("backend", "algorithm"), [*PAIRS, *STANDINS])
@pytest.mark.usefixtures("standins")
def test_shapes_that_need_padding(backend: Any, algorithm: str, shape: tuple[int, int]) -> None:
    weight = layer(algorithm, *shape)
    for probe in (identity_probe, random_probe, poison_probe):
        assert probe(backend, weight, CPU).status == "pass", probe.__name__


@pytest.mark.parametrize(("backend", "algorithm"), [*PAIRS, *STANDINS])
@pytest.mark.usefixtures("standins")
def test_an_output_is_written_whole_and_returned(backend: Any, algorithm: str) -> None:
    weight = layer(algorithm, 150, 80)
    activations = random_activations(weight, 33, CPU)
    out = torch.full((33, 150), torch.nan, dtype=torch.bfloat16)
    found = backend.gemm(backend.prepare(weight, poison=True), activations, 0.5, out)
    assert found.dtype == torch.bfloat16 and tuple(found.shape) == (33, 150) and bool(found.isfinite().all())
    assert torch.equal(found, backend.gemm(backend.prepare(weight, poison=False), activations, 0.5, None))


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_bf16_differs_from_the_referee_by_nothing(algorithm: str) -> None:
    weight = layer(algorithm, 150, 80)
    activations = random_activations(weight, 33, CPU)
    alpha = weight.tensor_scale * activations.tensor_scale
    found = Bf16().gemm(Bf16().prepare(weight, poison=False), activations, alpha, None)
    assert torch.equal(found, exact(weight, activations, alpha).to(torch.bfloat16))


def test_every_code_times_every_scale_fits_bf16() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = scales[scales.to(torch.float32).isfinite()]
    assert len(scales) == 254
    packed = torch.arange(256, dtype=torch.uint8).view(-1, 8).repeat(len(scales), 1)
    scale = scales.repeat_interleave(32)[:, None]
    wanted = dequantize_nvfp4(packed, scale, torch.tensor(1.0))
    assert torch.equal(decode_nvfp4(packed, scale).to(torch.float32), wanted)
    assert torch.equal(wanted.to(torch.float16).to(torch.float32), wanted)


def test_what_multiplies_decoded_operands_takes_every_format() -> None:
    assert Reference.formats == Bf16.formats == set(FORMATS)


class Zeros(Reference):
    def gemm(self, prepared: Weight, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        return torch.zeros_like(super().gemm(prepared, activations, alpha, out))


class Unwritten(Reference):
    def gemm(self, prepared: Weight, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        return super().gemm(prepared, activations, alpha, out) if out is None else out


class SmallM(TorchFp8):
    """Zeros at some sizes, as flashinfer#3398."""

    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        result = super().gemm(prepared, activations, alpha, out)
        return result.zero_() if len(activations.codes) == 32 else result


class NoBias(TorchFp8):
    def prepare(self, weight: Fp8Weight, *, poison: bool) -> Any:
        return super().prepare(replace(weight, bias=None), poison=poison)


class ReadsPastN(SglNvfp4):
    """A kernel whose tile of 128 rows leaks into the rows that are asked for."""

    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        result = super().gemm(prepared, activations, alpha, out)
        return result + prepared.scale.to(torch.bfloat16)[-1, -1] * 0


@pytest.mark.parametrize(
    ("broken", "algorithm", "words"),
    [
        (Zeros(), "nvfp4", "identity probe"),
        (Unwritten(), "fp8", "poison probe"),
        (SmallM(), "fp8", "sweep probe"),
        (NoBias(), "fp8", "sweep probe"),
    ],
)
def test_a_broken_backend_is_found_out(broken: Any, algorithm: str, words: str) -> None:
    assert words in (self_test(broken, algorithm, CPU) or "")


@pytest.mark.usefixtures("standins")
def test_fp8_pads_k_too() -> None:
    for backend in (TorchFp8(), SglFp8(), Bf16()):
        assert random_probe(backend, layer("fp8", 40, 72), CPU).status == "pass"


@pytest.mark.usefixtures("standins")
def test_a_kernel_that_reads_rows_past_n_is_poisoned() -> None:
    weight = layer("nvfp4", 150, 80)
    assert random_probe(ReadsPastN(), weight, CPU).status == "pass"
    assert poison_probe(ReadsPastN(), weight, CPU).status == "fail"


def test_poison_lies_where_no_kernel_multiplies() -> None:
    scale = torch.rand(150, 5).add(0.5).to(torch.float8_e4m3fn)
    for poison in (False, True):
        linear = unswizzle_128x4(kernel_scales(scale, 6, poison=poison), 256, 8).view(torch.uint8)
        assert torch.equal(linear[:150, :5], scale.view(torch.uint8))
        assert not linear[:150, 5:].any(), "columns past K are multiplied with codes of zero"
        assert bool((linear[150:] == (0x7F if poison else 0)).all())
        strided = strided_scales(scale, poison=poison)
        assert torch.equal(strided[:150, :5], scale.view(torch.uint8))
        assert bool((strided[150:] == (0x7F if poison else 0)).all() and (strided[:, 5:] == strided[-1, -1]).all())


def test_padding_of_whole_tiles_is_none() -> None:
    scale = torch.ones(128, 4).to(torch.float8_e4m3fn)
    assert torch.equal(kernel_scales(scale, 4, poison=True).view(torch.uint8), scale.view(torch.uint8))
    codes = torch.ones(2, 3, dtype=torch.uint8)
    assert pad_bytes(codes, 2, 3).data_ptr() == codes.data_ptr()
    assert pad_bytes(codes, 3, 4).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_epilogue_rounds_once() -> None:
    # 1 + 2^-8 is a tie in BF16: rounded before the bias it would be 1.
    accumulators, bias = torch.tensor([[2.0]]), torch.tensor([2.0**-8 + 2.0**-12])
    assert epilogue(accumulators, 0.5, bias, None).item() == 1 + 2.0**-7
    assert accumulators.item() == 2.0
    out = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert epilogue(accumulators, 0.5, None, out) is out and out.item() == 1.0
    assert deliver(torch.ones(1, 3, dtype=torch.bfloat16), 1, out) is out


def test_reasons_on_a_cpu() -> None:
    assert Bf16().unavailable(CPU) == "needs a CUDA GPU"
    assert TorchNvfp4().unavailable(CPU) == "needs a CUDA GPU"
    assert SglFp8().unavailable(CPU) == SglNvfp4().unavailable(CPU) == "needs a CUDA GPU"
    assert TorchFp8().unavailable(CPU) is None and Reference().unavailable(CPU) is None


def test_what_a_release_of_sgl_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sgl_kernel", gpu_standins.sgl_kernel("fp8_scaled_mm"))
    assert sgl_kernel.missing("fp8_scaled_mm") is None
    assert sgl_kernel.missing("cutlass_scaled_fp4_mm") == "this release of sgl_kernel has no cutlass_scaled_fp4_mm"
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    assert sgl_kernel.missing("fp8_scaled_mm") == "sgl_kernel is not installed"


def test_sgl_kernel_without_its_binaries(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ImportError("[sgl_kernel] CRITICAL: Could not load any common_ops library!\n\nAttempted locations")

    monkeypatch.setattr(sgl_kernel.importlib, "import_module", fails)
    assert sgl_kernel.missing("fp8_scaled_mm") == "sgl_kernel's binaries do not load here"


def test_a_refusal_is_one_line() -> None:
    def raises(error: Exception) -> Any:
        def call() -> Tensor:
            raise error

        return call

    cublas = "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic( ltHandle )`\nmore"
    assert refusal(raises(RuntimeError(cublas))) == "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"
    assert refusal(raises(ValueError())) == "ValueError"
    assert refusal(lambda: torch.full((1,), torch.nan)) == "its result is not finite"
    assert refusal(lambda: torch.zeros(1)) is None
    with pytest.raises(KeyError):
        refusal(raises(KeyError("a fault of ours")))


def test_torch_is_asked_for_slow_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = torch._scaled_mm

    def watched(*arguments: Any, **options: Any) -> Tensor:
        seen.append(options["use_fast_accum"])
        return real(*arguments, **options)

    monkeypatch.setattr(torch_scaled.torch, "_scaled_mm", watched)
    assert random_probe(TorchFp8(), layer("fp8", 32, 32), CPU).status == "pass" and seen == [False]
