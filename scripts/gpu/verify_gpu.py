"""Figures of the GEMM backends on a machine with a CUDA GPU, over real ModelOpt exports of FLUX.1-dev's layer shapes.

    python scripts/gpu/verify_gpu.py docs/verify-h100

makes a seeded transformer with the width of FLUX.1 [dev] (hidden 3072, 24 heads of 128) and 2 + 2 blocks in a temporary
folder, lets ModelOpt export it as NVFP4 and as FP8, runs every probe of every backend on every quantized module, plants
faults, and writes docs/verify-h100.json and .md. Needs the ``modelopt`` extra, triton and a GPU; --tiny --device cpu
tries the script out.
"""

import argparse
import contextlib
import json
import math
import platform
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_faults import Faulty, faults
from gpu_report import markdown
from make_export import make_family
from safetensors import safe_open
from tiny_models import FAMILIES

from modelopt_convert.formats.fp8.codes import quantize_fp8
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
from modelopt_convert.verification.gemm.backends.bf16 import Bf16
from modelopt_convert.verification.gemm.backends.reference import Reference
from modelopt_convert.verification.gemm.backends.sgl_kernel import SglFp8, SglNvfp4
from modelopt_convert.verification.gemm.backends.torch_scaled import TorchFp8, TorchNvfp4
from modelopt_convert.verification.gemm.backends.triton_gemm import TritonDecode, TritonNative
from modelopt_convert.verification.gemm.fp8 import Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Weight, random_activations
from modelopt_convert.verification.gemm.probes import (
    ProbeResult,
    identity_probe,
    poison_probe,
    random_probe,
    sweep_probe,
)
from modelopt_convert.verification.gemm.selftest import self_test

WIDTH = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
ODD_SHAPES = ((16, 16), (150, 80), (200, 272), (1000, 3056))
BACKENDS = (TritonNative, TorchNvfp4, SglNvfp4, TorchFp8, SglFp8, TritonDecode, Bf16, Reference)
PROBES = {"identity": identity_probe, "random": random_probe, "sweep": sweep_probe, "poison": poison_probe}


def main() -> None:
    """Make the exports, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="path of both files without their suffix")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="a small model in place of one of full width")
    arguments = parser.parse_args()
    family = FAMILIES["flux1"]
    if not arguments.tiny:
        family = replace(family, config={**family.config, **WIDTH})
    report: dict[str, Any] = {
        "command": f"python scripts/gpu/verify_gpu.py {Path('docs') / arguments.output.name}",
        "environment": _environment(arguments.device),
        "model": {"class": family.class_name, **family.config},
    }
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        make_family(family, ["nvfp4", "fp8"], Path(folder))
        print(f"exports made in {time.perf_counter() - begin:.0f} s", flush=True)
        for algorithm in ("nvfp4", "fp8"):
            weights = dict(_weights(Path(folder) / algorithm / "transformer"))
            report[algorithm] = _measure(algorithm, weights, arguments.device)
    report["mmaemu"] = _emulator(arguments.device)
    arguments.output.with_suffix(".json").write_text(_json(report), "utf-8")
    arguments.output.with_suffix(".md").write_text(markdown(report), "utf-8")


def _environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "triton", "sglang-kernel", "nvidia-modelopt", "diffusers", "safetensors", "mmaemu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return found


def _weights(folder: Path) -> Iterator[tuple[str, Weight]]:
    """Every quantized module of an export, in the file's own layout: row-major scales, low nibble first."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in list(file.keys())})
    for name in sorted(tensors):
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        weight, scale, bias = tensors[f"{module}.weight"], tensors[name], tensors.get(f"{module}.bias")
        if weight.dtype == torch.uint8:
            yield module, Nvfp4Weight(weight, scale, float(tensors[f"{module}.weight_scale_2"]), bias)
        else:
            yield module, Fp8Weight(weight, float(scale), bias)


def _measure(algorithm: str, weights: dict[str, Weight], device: torch.device) -> dict[str, Any]:
    backends: dict[str, Any] = {}
    usable = []
    for backend in (kind() for kind in BACKENDS):
        if algorithm not in backend.formats:
            continue
        reason = backend.unavailable(device)
        label = f"{backend.name} ({backend.kind})"
        backends[label] = {"unavailable": reason}
        if reason is None:
            backends[label]["self_test"] = self_test(backend, algorithm, device) or "pass"
            backends[label] |= _over_layers(backend, weights, device)
            backends[label]["odd shapes"] = _odd_shapes(backend, algorithm, device)
            usable.append(backend)
        print(algorithm, label, {k: v for k, v in backends[label].items() if k != "layers"}, flush=True)
    native = [b for b in usable if b.kind == "native"]
    tables = {f"{b.name} ({b.kind})": _planted(b, weights, device) for b in usable if b.kind != "reference"}
    return {
        "modules": len(weights),
        "native_kernels_executed": len(weights) if native else 0,
        "backends": backends,
        "planted": tables,
    }


def _over_layers(backend: Any, weights: dict[str, Weight], device: torch.device) -> dict[str, Any]:
    layers, seconds = {}, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for name, stored in weights.items():
        begin = time.perf_counter()
        weight = stored.to(device)
        results = {probe: run(backend, weight, device) for probe, run in PROBES.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        layers[name] = {
            "shape": weight.shape,
            "seconds": round(seconds[-1], 4),
            "gemm_ms": _gemm_ms(backend, weight, device),
        }
        layers[name] |= {probe: _plain(result) for probe, result in results.items()}
    metrics = [layer[probe]["metrics"] for layer in layers.values() for probe in ("random", "sweep", "poison")]
    return {
        "passed": {p: sum(layer[p]["status"] == "pass" for layer in layers.values()) for p in PROBES},
        "worst": {
            "calc_diff": max(m["calc_diff"] for m in metrics),
            "relative_frobenius": max(m["relative_frobenius"] for m in metrics),
            "worst_row": max(m["worst_row"] for m in metrics),
            "worst_column": max(m["worst_column"] for m in metrics),
            "gain_off_by": max(abs(m["gain"] - 1) for m in metrics),
        },
        "seconds_a_layer": {"median": sorted(seconds)[len(seconds) // 2], "largest": max(seconds), "all": sum(seconds)},
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "layers": layers,
    }


def _gemm_ms(backend: Any, weight: Weight, device: torch.device) -> float:
    """Median of one gemm with 512 rows: activations prepared and output rounded, the weight prepared before."""
    prepared, activations, times = backend.prepare(weight, poison=False), random_activations(weight, 512, device), []
    for _ in range(7):
        begin = time.perf_counter()
        backend.gemm(prepared, activations, 1.0, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return round(sorted(times)[3] * 1e3, 3)


def _odd_shapes(backend: Any, algorithm: str, device: torch.device) -> dict[str, str]:
    """Where padding is needed, which no layer of this model does."""
    found = {}
    for rows, columns in ODD_SHAPES:
        generator = torch.Generator().manual_seed(rows)
        values = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        bias = torch.randn(rows, generator=generator).to(torch.bfloat16)
        weight: Weight
        if algorithm == "fp8":
            scale = values.abs().amax().to(torch.float32) / 448
            weight = Fp8Weight(quantize_fp8(values, scale), float(scale), bias)
        else:
            tensor_scale = shared_global_scale([values])
            weight = Nvfp4Weight(*quantize_nvfp4(values, tensor_scale), float(tensor_scale), bias)
        failed = [p for p, run in PROBES.items() if run(backend, weight.to(device), device).status != "pass"]
        found[f"{rows}x{columns}"] = "fails " + ", ".join(failed) if failed else "pass"
    return found


def _planted(backend: Any, weights: dict[str, Weight], device: torch.device) -> dict[str, Any]:
    names = [name for name in weights if name.endswith((".attn.to_q", ".attn.to_k"))][:2]
    judged, other = (weights[name].to(device) for name in reversed(names))
    table: dict[str, Any] = {"module": names[1], "other": names[0], "faults": {}}
    for name, fault in faults(judged).items():
        faulty = Faulty(backend, fault, other)
        results = {probe: run(faulty, judged, device) for probe, run in PROBES.items()}
        seen = [probe for probe, result in results.items() if result.status == "fail"]
        warned = [probe for probe, result in results.items() if result.status == "warn"]
        table["faults"][name] = {"seen": seen, "warned": warned} | {p: _plain(r) for p, r in results.items()}
    return table


def _emulator(device: torch.device) -> dict[str, Any]:
    """An outside oracle: mmaemu computes on the CPU the bits that an H100's FP8 GEMM returns."""
    try:
        import mmaemu
    except ImportError:
        return {"unavailable": "mmaemu is not installed"}
    if device.type != "cuda":
        return {"unavailable": "needs a CUDA GPU"}
    found: dict[str, Any] = {}
    for rows, features, columns in ((64, 256, 3072), (128, 256, 3072), (64, 512, 2048)):  # that it knows the split of
        generator = torch.Generator().manual_seed(rows)
        left, right = (torch.randn(n, columns, generator=generator).to(torch.float8_e4m3fn) for n in (rows, features))
        scale = torch.tensor(0.37), torch.tensor(0.021)
        on_gpu = torch._scaled_mm(
            left.to(device),
            right.to(device).T,
            *(value.to(device) for value in scale),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        key = f"{rows}x{features}x{columns}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                here = mmaemu.scaled_mm(left, right.T, *scale, out_dtype=torch.bfloat16, use_fast_accum=False)
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"[:300]
            continue
        found[key] = {"values": here.numel(), "bits_differ": int((here != on_gpu.cpu()).sum())}
    return found


def _plain(result: ProbeResult) -> dict[str, Any]:
    known = ("probe", "sizes")  # the same everywhere
    plain = {key: value for key, value in asdict(result).items() if value not in ("", (), None) and key not in known}
    if result.metrics is not None:
        plain["metrics"] = {key: _short(value) for key, value in asdict(result.metrics).items()}
    return plain


def _short(value: float) -> float:
    return value if isinstance(value, bool) or not math.isfinite(value) else float(f"{value:.6g}")


def _json(report: dict[str, Any]) -> str:
    """A line for every layer, so that two files can be compared."""
    text = json.dumps(report, indent=1, default=str)
    return re.sub(r"\n {5,} *", " ", text) + "\n"


if __name__ == "__main__":
    main()
