"""What emulation costs at FLUX.1-dev's full size, with random weights: a step of the transformer, and its memory.

    python scripts/bench/bench_fidelity.py [--device cuda] [--sizes 512 1024] [--runs 5] [--tiny] [--output FILE.json]

Runs the transformer in BF16, then with the modules that the preset packs emulated as W4A4 with dynamic input scales:
packed weights decoded per call, and decoded copies kept; by plain torch, and by kernels of Triton.
Where nvidia-modelopt can be imported, its Triton kernel quantizes the same activations, and values and times are
compared. Needs torch, diffusers and this source tree; what else mopt imports on the way is not called here.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
# Imported by modules that read files, which nothing here does.
for _name in ("xxhash", "pydantic", "pydantic_core", "llvmlite"):
    if find_spec(_name) is None:
        sys.modules[_name] = ModuleType(_name)

from modelopt_convert.fidelity.activations import dynamic  # noqa: E402
from modelopt_convert.fidelity.emulation import Emulated  # noqa: E402
from modelopt_convert.fidelity.selftest import kernels_agree, self_test  # noqa: E402
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale  # noqa: E402
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight  # noqa: E402

HEADERS = ROOT / "tests" / "preset" / "headers" / "flux1-dev.json"
TINY = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}
# What presets/flux1-dev.toml packs.
PACKED = re.compile(r"transformer_blocks\.\d+\.attn\..*|single_transformer_blocks\.\d+\.(attn\..*|proj_out)")
_TEXT_TOKENS = 512
_WARM = 3


def model_of(device: torch.device, *, tiny: bool) -> nn.Module:
    """The transformer with random weights, small enough that activations stay numbers."""
    from diffusers import FluxTransformer2DModel

    config = {key: value for key, value in json.loads(HEADERS.read_text())["config"].items() if key[0] != "_"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = FluxTransformer2DModel(**config | (TINY if tiny else {}))
    finally:
        torch.set_default_dtype(before)
    draw = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=draw)
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def inputs_of(model: Any, size: int, device: torch.device) -> dict[str, Any]:
    """Seeded inputs of a picture of so many pixels."""
    side, config, draw = size // 16, model.config, torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return {
        "hidden_states": random(1, side * side, config.in_channels),
        "encoder_hidden_states": random(1, _TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=torch.bfloat16),
        "img_ids": ids.to(device),
        "txt_ids": torch.zeros(_TEXT_TOKENS, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
        "return_dict": False,
    }


def timed(work: Callable[[], Any], device: torch.device, runs: int) -> dict[str, float]:
    """Seconds of a call: median, least and most, after some that are not counted; and peak memory of the GPU."""
    on_gpu = device.type == "cuda"
    for _ in range(_WARM):
        work()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    found = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(device)} if on_gpu else {})


def quantized(model: nn.Module) -> dict[str, Nvfp4Weight]:
    """The modules that the preset packs, quantized where they are."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and PACKED.fullmatch(name):
            scale = shared_global_scale([module.weight])
            packed, scales = quantize_nvfp4(module.weight, scale)
            found[name] = Nvfp4Weight(packed, scales, float(scale), module.bias)
    return found


def sqnr_db(exact: torch.Tensor, got: torch.Tensor) -> float:
    noise = (exact.double() - got.double()).square().sum()
    return float(10 * (exact.double().square().sum() / noise).log10())


def fake_quant(device: torch.device, rows: int, columns: int, runs: int) -> dict[str, Any]:
    """ModelOpt's Triton kernel against ours, on the same activations of three sizes."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    try:
        from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block
    except Exception as error:  # not installed, or for other versions of torch and triton
        return {"skipped": f"{type(error).__name__}: {error}"}
    from modelopt_convert.fidelity import triton_kernels as kernels

    found: dict[str, Any] = {}
    for size in (1.0, 1e-3, 1e-5):
        draw = torch.Generator(device).manual_seed(3)
        values = (torch.randn(rows, columns, device=device, generator=draw) * size).to(torch.bfloat16)
        amax = values.abs().amax().float()
        scale = amax / 2688
        mine = (kernels.quantize(values, scale).float() * scale).to(torch.bfloat16)
        theirs = fp4_fake_quant_block(values, amax)
        found[f"activations of {size:g}"] = {
            "values_that_differ": float((mine != theirs).float().mean()),
            "ours_sqnr_db": sqnr_db(values, mine),
            "modelopt_sqnr_db": sqnr_db(values, theirs),
            "ours": timed(lambda values=values, scale=scale: kernels.quantize(values, scale), device, runs),  # type: ignore[misc]
            "modelopt": timed(lambda values=values, amax=amax: fp4_fake_quant_block(values, amax), device, runs),  # type: ignore[misc]
        }
    return found


def gemm(device: torch.device, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One layer's GEMM against float64, of the operands as they are."""
    from modelopt_convert.fidelity.emulation import multiply

    rows, columns, outputs = shape
    draw = torch.Generator(device).manual_seed(4)
    left = dynamic("nvfp4", torch.randn(rows, columns, device=device, generator=draw)).operand
    right = dynamic("nvfp4", torch.randn(outputs, columns, device=device, generator=draw)).operand
    got, exact = multiply(left, right), left.double() @ right.double().t()
    different = (got.to(torch.bfloat16) != exact.to(torch.bfloat16)).float().mean()
    return {"shape": list(shape), "sqnr_db": sqnr_db(exact, got), "bf16_outputs_that_differ": float(different)}


def main(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="two blocks of width 256, to try the script")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "self_test": [f"{one.name}: {one.detail}" for one in self_test({"nvfp4", "fp8"}, device)],
        "kernels_agree": kernels_agree({"nvfp4"}, device) if on_gpu else None,
        "gemm": gemm(device, (96, 512, 256) if options.tiny else (4608, 3072, 12288)),
        "fake_quant": fake_quant(device, 4608, 3072, options.runs),
    }
    model: Any = model_of(device, tiny=options.tiny)
    with torch.inference_mode():
        inputs = {size: inputs_of(model, size, device) for size in options.sizes}
        base = {size: model(**given)[0].cpu() for size, given in inputs.items()}
        plain = {size: timed(lambda: model(**given), device, options.runs) for size, given in inputs.items()}  # noqa: B023
        begin = time.perf_counter()
        weights = quantized(model)
        found |= {"modules": len(weights), "quantize_s": time.perf_counter() - begin, "bf16": plain}
        ways = [(rule, keep, quick) for rule in ("dynamic",) for keep in (False, True) for quick in (False, True)]
        for rule, keep, quick in [*ways, ("weight-only", False, False)]:
            if quick and not on_gpu:
                continue
            for name, weight in weights.items():  # what stood there before is given up: its memory counts for nobody
                model.set_submodule(name, Emulated(weight, rule, keep=keep, compiled=quick).to(device))
            if on_gpu:
                torch.cuda.empty_cache()
            rows = {}
            for size, given in inputs.items():
                row: dict[str, Any] = timed(lambda: model(**given), device, options.runs)  # noqa: B023
                row["times_bf16"] = row["median_s"] / plain[size]["median_s"]
                row["sqnr_db"] = sqnr_db(base[size], model(**given)[0].cpu())
                rows[size] = row
            where = "kept" if keep else "decoded per call"
            title = f"{rule}, {'Triton' if quick else 'plain torch'}, weights {where}"
            found[title] = rows
            print(json.dumps({title: rows}, indent=2), flush=True)
    text = json.dumps(found, indent=2) + "\n"
    if options.output is not None:
        options.output.write_text(text)
    print(text)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
