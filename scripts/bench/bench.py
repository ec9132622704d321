"""Speed and memory of mopt against cp, in one run: interleaved, medians, ratios.

    python scripts/bench/bench.py [--quick] [--dir FOLDER] [--output FILE.md]

Makes FLUX.1-shaped checkpoints of about 4 GB (--quick: 200 MB) in FOLDER: the base in BF16, an NVFP4 export of it, the
same with its scales in the 128x4 order, and the same with one global scale for all, so that any names can fuse it.
Each command is timed in a process of its own with the files in the page cache, a sync included, and so is ``cp -r``
of the same bytes; what the same command takes for a FLUX.1 of 1 MB is measured too and taken off. Peak memory is VmHWM
of the process, less that of the small run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from benching import RUNS, Measured, machine, num_bytes, run, run_mopt, warm


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: In words.
        arguments: Of mopt; OUT is replaced by a folder that does not exist.
        copied: Whose bytes cp moves for comparison: a folder, or OUT.
        target: What the ratio should reach, if anything.
    """

    name: str
    arguments: list[str]
    copied: str
    target: float | None


def cases(folder: Path) -> list[Case]:
    """Commands, from the heaviest use to the lightest."""
    base, export, swizzled, equal = (str(folder / name) for name in KINDS)
    build = ["build-nvfp4", "--preset", "flux1-dev", "--base", base, "--output", "OUT", "--verify", "cpu"]
    return [
        Case("build-nvfp4 from an export", [*build, "--export", export], "OUT", 0.8),
        Case("the same, without the closing verify", [*build[:-1], "off", "--export", export], "OUT", 0.8),
        Case("build-nvfp4 from a swizzled export", [*build, "--export", swizzled], "OUT", None),
        Case("build-nvfp4 of the base itself", build, base, None),
        Case("swap-nibbles", ["swap-nibbles", export, "OUT"], export, 0.8),
        Case("unswizzle-scales", ["unswizzle-scales", swizzled, "OUT"], swizzled, 0.8),
        Case("convert to ComfyUI's file, read back", ["convert", equal, "OUT", "--to", "comfyui"], equal, 0.8),
    ]


SIZES: dict[str, dict[str, object]] = {
    "full": {"num_layers": 3, "num_single_layers": 6},
    # One block of each kind is the least that a preset takes; at the real width that would be 1 GB.
    "quick": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 10},
    "tiny": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
}


KINDS = ("base", "export", "swizzled", "equal")


def make(folder: Path, size: str, kinds: Collection[str] = KINDS) -> None:
    """Write those of base, export and swizzled export that are wanted."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file
    from sparse_flux1 import _LEFT_ALONE, _QUANTIZATION

    from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
    from modelopt_convert.formats.nvfp4.scales import swizzle_128x4

    with torch.device("meta"):
        model = FluxTransformer2DModel(**SIZES[size], guidance_embeds=True)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config["_class_name"] = "FluxTransformer2DModel"
    torch.manual_seed(0)
    base = {name: (torch.randn(one.shape) * 0.02).to(torch.bfloat16) for name, one in model.named_parameters()}
    export, swizzled = {}, {}
    for name, tensor in base.items() if {"export", "swizzled"} & set(kinds) else ():
        if tensor.ndim != 2 or name.startswith(_LEFT_ALONE):
            export[name] = swizzled[name] = tensor
            continue
        module = name.removesuffix(".weight")
        scale_2 = shared_global_scale([tensor])
        packed, scale = quantize_nvfp4(tensor, scale_2)
        rest = {name: packed, f"{module}.weight_scale_2": scale_2, f"{module}.input_scale": torch.tensor(0.01)}
        export |= rest | {f"{module}.weight_scale": scale}
        swizzled |= rest | {f"{module}.weight_scale": swizzle_128x4(scale)}
    for where, tensors, extra in (
        ("base", base, {}),
        ("export", export, {"quantization_config": _QUANTIZATION}),
        ("swizzled", swizzled, {"quantization_config": _QUANTIZATION}),
    ):
        if where not in kinds:
            continue
        (folder / where).mkdir(parents=True)
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(own, folder / where / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (folder / where / "config.json").write_text(json.dumps(config | extra))
    if "equal" in kinds:
        shutil.copytree(folder / "export", folder / "equal")
        _give_one_scale(folder / "equal" / "diffusion_pytorch_model.safetensors")


def _give_one_scale(path: Path) -> None:
    """Overwrite every global scale with the first: the weights mean something else then, and lie the same."""
    from modelopt_convert.checkpoint.reader import CheckpointReader

    with CheckpointReader(path) as reader:
        scales = [info for name, info in reader.tensors.items() if name.endswith(".weight_scale_2")]
        first = reader.read(scales[0].name)
    with path.open("r+b") as file:
        for info in scales:
            file.seek(info.start)
            file.write(first)


def _mopt(case: Case, out: Path) -> Measured:
    return run_mopt(*(str(out) if word == "OUT" else word for word in case.arguments))


def measure(folder: Path, quiet: Callable[[str], None]) -> list[str]:
    """The table's lines."""
    lines = [
        "| command | GB | against cp | target | peak MB beyond start-up |",
        "|---|---|---|---|---|",
    ]
    out, copy = folder / "out", folder / "copy"
    for case, small in zip(cases(folder), cases(folder / "tiny"), strict=True):
        ours, peers, peaks = [], [], []
        for _ in range(RUNS):
            start = _mopt(small, out)
            shutil.rmtree(out)
            warm(*(folder / name for name in KINDS))
            done = _mopt(case, out)
            ours.append(done.seconds - start.seconds)
            peaks.append(done.peak_bytes - start.peak_bytes)
            source = out if case.copied == "OUT" else Path(case.copied)
            warm(source)
            peers.append(run(["cp", "-r", str(source), str(copy)]).seconds)
            size = num_bytes(source)
            shutil.rmtree(copy)
            shutil.rmtree(out)
        ratio = statistics.median(peers) / statistics.median(ours)
        target = "" if case.target is None else f">= {case.target}"
        lines.append(
            f"| `{case.name}` | {size / 1e9:.2f} | {ratio:.2f} | {target} | {statistics.median(peaks) / 1e6:.0f} |"
        )
        quiet(lines[-1])
    return lines


def quantizers() -> list[str]:
    """NVFP4 quantization on one thread against ModelOpt's, same bytes."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from modelopt_convert.formats.fp8.codes import quantize_fp8
    from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
    from modelopt_convert.formats.tensor_bytes import quantize_chunk, to_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(6144, 3072) * 0.02).to(torch.bfloat16)
    scale = shared_global_scale([weight])
    theirs = NVFP4QTensor.quantize(weight, 16, None, scale, try_tensorrt=False)[0]._quantized_data
    assert torch.equal(quantize_nvfp4(weight, scale)[0], theirs)
    raw, fp8_scale = memoryview(bytearray(to_bytes(weight))), float(weight.abs().max()) / 448
    pieces = [raw[at : at + (2 << 20)] for at in range(0, len(raw), 2 << 20)]
    jobs: dict[str, Callable[[], object]] = {
        "memcpy": weight.clone,
        "ModelOpt NVFP4QTensor.quantize": lambda: NVFP4QTensor.quantize(weight, 16, None, scale, try_tensorrt=False),
        "mopt quantize_nvfp4": lambda: quantize_nvfp4(weight, scale),
        "FP8 cast, whole tensor": lambda: quantize_fp8(weight, torch.tensor(fp8_scale)),
        "mopt FP8 cast by table, checks included": lambda: [quantize_chunk(one, "BF16", fp8_scale) for one in pieces],
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(RUNS):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - begin)
    best = {name: statistics.median(values) for name, values in times.items()}
    reference = {"mopt quantize_nvfp4": "ModelOpt NVFP4QTensor.quantize"}
    reference["mopt FP8 cast by table, checks included"] = "FP8 cast, whole tensor"
    lines = ["| one thread, 6144x3072 BF16 | of memcpy | against its peer |", "|---|---|---|"]
    for name, value in best.items():
        peer = f"{best[reference[name]] / value:.1f}x" if name in reference else ""
        lines.append(f"| {name} | {best['memcpy'] / value:.3f} | {peer} |")
    return lines


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a base of 200 MB rather than 4 GB: a try, whose times are mostly noise"
    )
    parser.add_argument("--dir", type=Path, help="where to make them; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mopt-bench-", dir=arguments.dir))
    try:
        make(folder, "quick" if arguments.quick else "full")
        make(folder / "tiny", "tiny")
        lines = measure(folder, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        shutil.rmtree(folder)
    text = "\n".join(["", *lines, "", *quantizers(), "", f"{machine()}, {RUNS} runs each.", ""])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
