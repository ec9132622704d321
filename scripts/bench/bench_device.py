"""What --device cuda gains: build-nvfp4 of a base, and of an export, on the CPU and on a GPU, with the same bytes.

    python scripts/bench/bench_device.py [--quick] [--dir FOLDER] [--workers N] [--output FILE.md]

Makes a FLUX.1-shaped base of about 4 GB (--quick: 200 MB) and an export of it in FOLDER and builds from them in turns,
each command in a process of its own, files in the page cache, a sync included: on the CPU, on the GPU, and on the GPU
with nothing overlapped (each chunk waited for before the next is read). All files of all builds of one kind must have
the same bytes.
What one chunk takes at each step is measured apart; from that comes the share of the time in which kernels run.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_support import MAIN, RUNS, make_base, quantize, working_s

CHUNKS = 40
KERNELS = ("kernels that measure, launches included", "kernels that quantize, launches included")
ONE_BY_ONE = f"""
from modelopt_convert.write.gpu import Slot
launch = Slot.launch
def waited(self, work, num_bytes):
    launch(self, work, num_bytes)
    self.wait()
Slot.launch = waited
{MAIN}
"""
WAYS = {
    "cpu": (MAIN, "--verify", "off"),
    "cuda": (MAIN, "--verify", "off", "--device", "cuda"),
    "cuda, nothing overlapped": (ONE_BY_ONE, "--verify", "off", "--device", "cuda"),
    "cpu, closing verify on the GPU": (MAIN,),
    "cuda, closing verify on the GPU": (MAIN, "--device", "cuda"),
    "cpu, from an export": (MAIN, "--verify", "off", "--export", "EXPORT"),
    "cuda, from an export": (MAIN, "--verify", "off", "--export", "EXPORT", "--device", "cuda"),
}
PEERS = {
    "cuda": "cpu",
    "cuda, nothing overlapped": "cpu",
    "cuda, closing verify on the GPU": "cpu, closing verify on the GPU",
    "cuda, from an export": "cpu, from an export",
}


def builds(base: Path, workers: list[str], quiet: Callable[[str], None]) -> tuple[list[str], float, int]:
    """The table of whole commands, the seconds of measuring and streaming on the GPU, and the bytes of weights."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {name: [] for name in WAYS}
    for _ in range(RUNS):
        for name, (code, *more) in WAYS.items():
            words = [str(base.parent / "export") if word == "EXPORT" else word for word in more]
            out = base.parent / ("proven" if "EXPORT" in more else "out")
            found[name].append(quantize(code, base, out, *words, *workers))
            quiet(f"{name}: {found[name][-1][0]:.1f} s")
    whole = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    inner = {name: statistics.median(working_s(report) for _, report in runs) for name, runs in found.items()}
    size = sum(path.stat().st_size for path in base.iterdir())
    lines = [
        "| `build-nvfp4` | seconds | against the CPU | measure, prove and stream, s | GB/s of input | "
        "against the CPU | peak RSS, GB | peak GPU memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        peer = PEERS.get(name, name)
        gpu = max(report["peak_gpu_bytes"] or 0 for _, report in runs)
        rss = statistics.median(report["peak_rss_bytes"] for _, report in runs)
        lines.append(
            f"| {name} | {whole[name]:.1f} | {whole[peer] / whole[name]:.2f}x | {inner[name]:.2f} | "
            f"{size / inner[name] / 1e9:.2f} | {inner[peer] / inner[name]:.2f}x | {rss / 1e9:.2f} | {gpu / 1e9:.2f} |"
        )
    return lines, inner["cuda"], 4 * sum(map(_codes_bytes, (base.parent / "out.kept").glob("*.safetensors")))


def _codes_bytes(path: Path) -> int:
    """Bytes of the codes in a shard: two values each, whose BF16 take four times as much."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    places = [entry["data_offsets"] for entry in header.values() if entry.get("dtype") == "U8"]
    return sum(end - begin for begin, end in places)


class OneChunk:
    """What each step takes for one chunk alone.

    Attributes:
        times: Milliseconds of each step, by name.
    """

    def __init__(self, source: int, target: int) -> None:
        import torch

        from modelopt_convert.write.gpu import Slot

        self.times: dict[str, list[float]] = {}
        self._device = torch.device("cuda")
        self._slot = Slot(self._device)
        self._scale = torch.full((), 3e-5, dtype=torch.float32, device=self._device)
        self._source, self._target = source, target

    def again(self) -> None:
        """Take a chunk through all steps, one after the other."""
        import torch
        import xxhash

        from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4
        from modelopt_convert.formats.tensor_bytes import largest_bits, to_bytes

        slot = self._slot
        self._here("read from the page cache", lambda: os.preadv(self._source, [to_bytes(slot.given)], 1 << 24))
        slot.given.view(torch.bfloat16).copy_(torch.randn(slot.given.numel() // 2) * 0.02)
        raw = self._there("copy over", lambda: slot.given.to(self._device, non_blocking=True))
        weight = raw.view(torch.bfloat16).view(-1, 16)
        self._there(KERNELS[0], lambda: largest_bits(weight))
        packed, _ = self._there(KERNELS[1], lambda: quantize_nvfp4(weight, self._scale))
        self._there("copy back", lambda: slot.codes.copy_(packed.reshape(-1), non_blocking=True))
        self._here("digest of the codes", lambda: xxhash.xxh3_128(to_bytes(slot.codes)).hexdigest())
        self._here("write of the codes", lambda: os.pwrite(self._target, to_bytes(slot.codes), 0))

    def _here(self, name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self.times.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)

    def _there(self, name: str, work: Callable[[], Any]) -> Any:
        import torch

        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        found = work()
        after.record()
        after.synchronize()
        self.times.setdefault(name, []).append(before.elapsed_time(after))
        return found


def steps(base: Path) -> tuple[list[str], float, int]:
    """The table of one chunk's steps, the milliseconds of all kernels on it, and its bytes."""
    import torch

    from modelopt_convert.write.gpu import CHUNK_BYTES

    shard = next(base.glob("*.safetensors"))
    with shard.open("rb") as source, tempfile.TemporaryFile(dir=base) as target, torch.inference_mode():
        chunk = OneChunk(source.fileno(), target.fileno())
        for _ in range(CHUNKS):
            chunk.again()
    median = {name: statistics.median(values[3:]) for name, values in chunk.times.items()}
    lines = [f"| a chunk of {CHUNK_BYTES >> 20} MiB, alone | ms | GB/s of input |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {CHUNK_BYTES / value / 1e6:.1f} |" for name, value in median.items()]
    return lines, sum(median[name] for name in KERNELS), CHUNK_BYTES


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    folder = Path(tempfile.mkdtemp(prefix="mopt-bench-", dir=arguments.dir))
    workers = [] if arguments.workers is None else ["--workers", str(arguments.workers)]
    try:
        base = make_base(folder, quick=arguments.quick, kinds=("base", "export"))
        table, seconds, quantized = builds(base, workers, lambda line: print(line, file=sys.stderr, flush=True))
        rows, kernels_ms, chunk_bytes = steps(base)
    finally:
        shutil.rmtree(folder)
    busy = kernels_ms / 1e3 * quantized / chunk_bytes
    share = (
        f"{quantized / 1e9:.2f} GB of weights are measured and quantized: kernels for {busy:.3f} s, "
        f"{100 * busy / seconds:.1f}% of measure and stream."
    )
    cores = len(os.sched_getaffinity(0))
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {cores} cores, {' '.join(workers)}".rstrip(
        ", "
    )
    text = "\n".join(["", *table, "", *rows, "", share, "", f"{machine}; {RUNS} runs each, medians.", ""])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
