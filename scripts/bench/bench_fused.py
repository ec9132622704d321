"""What a fused kernel would gain: NVFP4 quantization in one loop of numba, against plain torch; the same bytes.

    python scripts/bench/bench_fused.py [--quick] [--dir FOLDER] [--output FILE]

numba is no dependency of mopt; install it for this. One thread first, against ModelOpt's quantizer and memcpy; then the
whole command ``build-nvfp4`` of a FLUX.1-shaped base of about 4 GB (--quick: 1 GB), with the kernel put in place of
``quantize_nvfp4_rows`` and without, interleaved, medians, files in the page cache, a sync included.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_support import MAIN, RUNS, make_base, quantize, working_s

try:
    import numba
except ImportError:
    raise SystemExit("numba is not installed: pip install numba") from None

HERE = Path(__file__).resolve().parent
FUSED = f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench_fused; bench_fused.install(); {MAIN}"
_TYPES = "void(uint16[::1], float32, uint8[::1], uint8[::1])"


@numba.njit(_TYPES, nogil=True, cache=True, error_model="numpy")
def fused(weight, global_scale, packed, scales):  # type: ignore[no-untyped-def]
    """Blocks of 16 BF16 values into codes and scales; what ``quantize_nvfp4`` does in a dozen passes."""
    bits = np.empty(16, np.uint32)
    values = bits.view(np.float32)
    codes = np.empty(16, np.uint8)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    divisor = np.float32(6.0) * global_scale
    for block in range(scales.size):
        begin = block * 16
        largest = np.uint32(0)
        for k in range(16):
            value = np.uint32(weight[begin + k])
            bits[k] = value << np.uint32(16)
            largest = max(largest, value & np.uint32(0x7FFF))
        one_bits[0] = largest << np.uint32(16)
        scale = one[0] / divisor
        if scale == np.float32(0.0):
            scale = np.float32(1.0)
        scale = min(max(scale, np.float32(2.0**-9)), np.float32(448.0))
        if scale < np.float32(2.0**-6):  # subnormal: so many times 2^-9, nearest even
            code = np.uint32(np.rint(scale * np.float32(512.0)))
            scale = np.float32(code) / np.float32(512.0)
        else:
            one[0] = scale
            word = one_bits[0]
            code = (
                (word + np.uint32(0x7FFFF) + ((word >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
            ) - np.uint32(960)
            one_bits[0] = (code + np.uint32(960)) << np.uint32(20)
            scale = one[0]
        scales[block] = np.uint8(code)
        factor = scale * global_scale
        for k in range(16):
            value = values[k] / factor
            size = abs(value)
            codes[k] = (
                np.uint8(size > np.float32(0.25))
                + np.uint8(size >= np.float32(0.75))
                + np.uint8(size > np.float32(1.25))
                + np.uint8(size >= np.float32(1.75))
                + np.uint8(size > np.float32(2.5))
                + np.uint8(size >= np.float32(3.5))
                + np.uint8(size > np.float32(5.0))
                + (np.uint8(value < np.float32(0.0)) << np.uint8(3))
            )
        for k in range(8):
            packed[block * 8 + k] = codes[2 * k] | (codes[2 * k + 1] << np.uint8(4))


def fused_rows(raw: bytes | memoryview, source: str, columns: int, scale: float) -> tuple[memoryview, memoryview]:
    """As ``formats.tensor_bytes.quantize_nvfp4_rows``, of BF16."""
    assert source == "BF16" and columns % 16 == 0
    weight = np.frombuffer(raw, dtype=np.uint16)
    packed, scales = np.empty(weight.size // 2, np.uint8), np.empty(weight.size // 16, np.uint8)
    fused(weight, np.float32(scale), packed, scales)
    return packed.data, scales.data


def install() -> None:
    """Put it in the place of mopt's own."""
    from modelopt_convert.formats import tensor_bytes as raw

    raw.quantize_nvfp4_rows = fused_rows


def same_bytes() -> None:
    """On every finite BF16 value, in three orders, under scales from tiny to huge."""
    import torch

    from modelopt_convert.formats.tensor_bytes import quantize_nvfp4_rows, to_bytes

    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = values[values.isfinite()]
    mixed = finite[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(0))]
    for order in (finite, finite.reshape(16, -1).t().contiguous(), mixed):
        for scale in (1e-42, 1e-30, 3e-5, 0.01, 1.0, 1e20):
            raw, exact = to_bytes(order), float(torch.tensor(scale))
            ours, theirs = quantize_nvfp4_rows(raw, "BF16", 16, exact), fused_rows(raw, "BF16", 16, exact)
            assert [bytes(one) for one in ours] == [bytes(one) for one in theirs], scale


def one_thread() -> list[str]:
    """The first table."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from modelopt_convert.formats.nvfp4.codes import shared_global_scale
    from modelopt_convert.formats.tensor_bytes import quantize_nvfp4_rows, to_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(6144, 3072) * 0.02).to(torch.bfloat16)
    scale = shared_global_scale([weight])
    theirs = NVFP4QTensor.quantize(weight, 16, None, scale, try_tensorrt=False)[0]._quantized_data
    raw = to_bytes(weight)
    step = 3072 * 2 * 341  # as the command reads it
    pieces = [raw[at : at + step] for at in range(0, len(raw), step)]
    jobs: dict[str, Callable[[], object]] = {
        "memcpy": weight.clone,
        "ModelOpt `NVFP4QTensor.quantize`": lambda: NVFP4QTensor.quantize(weight, 16, None, scale, try_tensorrt=False),
        "mopt, plain torch": lambda: [quantize_nvfp4_rows(one, "BF16", 3072, float(scale)) for one in pieces],
        "fused, numba": lambda: [fused_rows(one, "BF16", 3072, float(scale)) for one in pieces],
    }
    for name in ("mopt, plain torch", "fused, numba"):
        found = b"".join(bytes(codes) for codes, _ in jobs[name]())  # type: ignore[attr-defined]
        assert found == bytes(to_bytes(theirs)), name
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(2 * RUNS + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    peer = median["ModelOpt `NVFP4QTensor.quantize`"]
    lines = ["| one thread, 6144x3072 BF16 | GB/s of input | of memcpy | against ModelOpt |", "|---|---|---|---|"]
    for name, value in median.items():
        speed = len(raw) / value / 1e9
        lines.append(f"| {name} | {speed:.2f} | {median['memcpy'] / value:.3f} | {peer / value:.1f}x |")
    return lines


def whole_command(base: Path, quiet: Callable[[str], None]) -> list[str]:
    """The second table."""
    lines = [
        "| `build-nvfp4` of the base | plain torch, s | fused, s | gain | of measure and stream |",
        "|---|---|---|---|---|",
    ]
    for verify in ("off", "cpu"):
        seconds: dict[str, list[float]] = {MAIN: [], FUSED: []}
        working: dict[str, list[float]] = {MAIN: [], FUSED: []}
        for _ in range(RUNS):
            for code in (MAIN, FUSED):
                taken, report = quantize(code, base, base.parent / "out", "--verify", verify)
                seconds[code].append(taken)
                working[code].append(working_s(report))
        plain, fast = (statistics.median(seconds[code]) for code in (MAIN, FUSED))
        inner = statistics.median(working[MAIN]) / statistics.median(working[FUSED])
        lines.append(f"| `--verify {verify}` | {plain:.1f} | {fast:.1f} | {plain / fast:.2f}x | {inner:.2f}x |")
        quiet(lines[-1])
    return lines


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    same_bytes()
    folder = Path(tempfile.mkdtemp(prefix="mopt-bench-", dir=arguments.dir))
    try:
        base = make_base(folder, quick=arguments.quick)
        lines = [*one_thread(), "", *whole_command(base, lambda line: print(line, file=sys.stderr, flush=True))]
    finally:
        shutil.rmtree(folder)
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, numba {numba.__version__}, {RUNS} runs each."
    )
    text = "\n".join(["", *lines, "", machine, ""])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
