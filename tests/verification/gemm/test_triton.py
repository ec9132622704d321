"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled for Blackwell down to machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from root import ROOT

from modelopt_convert.verification.gemm.backends import triton_gemm
from modelopt_convert.verification.gemm.backends.triton_gemm import TritonDecode, TritonNative, refusal

CPU = torch.device("cpu")
RUN = """
import json, torch
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
from modelopt_convert.verification.gemm.backends.reference import exact
from modelopt_convert.verification.gemm.backends.triton_gemm import TritonDecode
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.operands import random_activations
from modelopt_convert.verification.gemm.selftest import self_test

cpu, backend, found = torch.device("cpu"), TritonDecode(), {}
assert backend.unavailable(cpu) is None
for rows, features, columns in ((1, 16, 16), (19, 150, 80), (130, 144, 336)):
    values = torch.randn(features, columns, generator=torch.Generator().manual_seed(features))
    scale = shared_global_scale([values])
    weight = Nvfp4Weight(*quantize_nvfp4(values, scale), float(scale), values[:, 0])
    activations = random_activations(weight, rows, cpu)
    alpha = weight.tensor_scale * activations.tensor_scale
    for poison in (False, True):
        prepared = backend.prepare(weight, poison=poison)
        assert int((prepared.scale == 0x7F).sum()) == (prepared.scale.numel() - weight.scale.numel() if poison else 0)
        output = backend.gemm(prepared, activations, alpha, None)
        wanted = exact(weight, activations, alpha).to(torch.bfloat16)
        found[f"{rows}x{features}x{columns} {poison}"] = int((output != wanted).sum())
print(json.dumps({"differ": found, "self_test": self_test(backend, "nvfp4", cpu)}))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    refusal.cache_clear()


def test_the_interpreter_differs_from_the_referee_by_nothing() -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["self_test"] is None
    assert len(found["differ"]) == 6 and not any(found["differ"].values()), found


@pytest.mark.parametrize("capability", sorted(triton_gemm.NATIVE_CAPABILITIES))
def test_blackwell_gets_the_nvfp4_instruction(capability: int) -> None:
    from modelopt_convert.verification.gemm.backends.triton_kernels import compile_ahead

    ptx = compile_ahead(capability, native=True)
    assert "mxf4nvf4" in ptx and f".target sm_{capability}a" in ptx


@pytest.mark.parametrize("capability", [90, 100])
def test_the_decoding_path_compiles_everywhere(capability: int) -> None:
    from modelopt_convert.verification.gemm.backends.triton_kernels import compile_ahead

    ptx = compile_ahead(capability, native=False)
    assert "mxf4nvf4" not in ptx and ("wgmma" in ptx or "tcgen05.mma" in ptx)


def test_a_gpu_is_asked_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(100) is None
    assert "Triton does not compile it" in (refusal(90) or "")
    monkeypatch.setattr(triton_gemm.sys, "executable", "/bin/false")
    assert refusal(103) == "Triton does not compile it (exit status 1)"


@pytest.mark.parametrize(
    ("capability", "native", "decode"),
    [
        ((10, 0), None, "the native path runs here"),
        ((12, 0), None, "the native path runs here"),
        ((12, 1), "Triton has no NVFP4 instruction for compute capability 12.1", None),
        ((9, 0), "Triton has no NVFP4 instruction for compute capability 9.0", None),
        ((8, 9), "Triton has no NVFP4 instruction for compute capability 8.9", None),
    ],
)
def test_one_path_for_every_gpu(
    capability: tuple[int, int], native: str | None, decode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_gemm, "refusal", lambda number: None)
    gpu = torch.device("cuda", 0)
    assert TritonNative().unavailable(gpu) == native and TritonDecode().unavailable(gpu) == decode
    assert TritonNative().kind == "native" and TritonDecode().kind == "emulated"


def test_reasons_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TritonNative().unavailable(CPU) == TritonDecode().unavailable(CPU) == "needs a CUDA GPU"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert TritonDecode().unavailable(CPU) == "triton is not installed"
