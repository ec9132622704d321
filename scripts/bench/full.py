"""Every command at FLUX.1-dev's full size, by number of workers, against cp of its output in the same run.

    python scripts/bench/full.py [--folder FOLDER] [--blocks DOUBLE SINGLE] [--workers 1 2 4 8 16] [--only WORD ...]
        [--runs N] [--minutes M] [--json FILE] [--markdown FILE] [--plot FILE.svg]

Needs mopt's own dependencies and torch, not diffusers: names and shapes are those of ``tests/preset/headers``. The
inputs are a base in BF16 (23.8 GB), an NVFP4 export that mopt's quantizer makes of it (6.7 GB), and the export with
its block scales in the 128x4 order while that is needed. Outputs are removed at once; 70 GB of room do. Inputs stay
in FOLDER for the next run, if it is given.

Each run is a process of its own, and a sync of what it wrote is counted. Start-up is what the same command takes for a
FLUX.1 of one block of each kind and an eighth of the width, with one worker; the memory of that run is subtracted from
peaks. Rounds begin with the most workers. A run that would not end within the minutes is left out, and the table says
so; the next call with the same --json goes on where this one ended.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benching import ROOT, RUNS, Measured, machine, num_bytes, run, run_mopt, warm
from growth_plot import Line, Panel, draw
from make_headers import expand
from sparse_flux1 import _QUANTIZATION, _packed, write_sparse

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4, shared_global_scale
from modelopt_convert.formats.tensor_bytes import from_bytes, to_bytes
from modelopt_convert.run.workers import torch_on_one_thread

HEADERS = ROOT / "tests" / "preset" / "headers" / "flux1-dev.json"
BLOCKS = (19, 38)
NARROW = 8  # of start-up: every shape stays a multiple of what layouts need
CORES = len(os.sched_getaffinity(0))
# The largest value of a weight, from 0.125 to 0.25, the same for weights that some engine's names fuse into one.
LARGEST, INPUT_SCALE = 0.125, 0.01
FUSED = re.compile(r"(attn\.(to|add)_[qkv](_proj)?|proj_mlp)\.weight$")
POOL = 1 << 26


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        name: In words.
        arguments: Of mopt, with BASE, EXPORT and SWIZZLED for inputs, and BUILT and OUT for what is written.
        counted: The folders whose bytes its speed is about.
        written: The folder that it writes, if any; cp is timed with that of the first command that writes there, since
            all outputs of a folder have the same size.
    """

    name: str
    arguments: tuple[str, ...]
    counted: tuple[str, ...]
    written: str | None = None


@dataclass
class Result:
    """One number of workers of one command.

    Attributes:
        seconds: Of each run.
        peaks: Peak memory of each run, in bytes.
        phases: Seconds of each phase by the command's own clock, of each run.
    """

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    def add(self, done: Measured) -> None:
        """One more run."""
        self.seconds.append(done.seconds)
        self.peaks.append(done.peak_bytes)
        self.phases.append(json.loads(done.printed)["timings_s"])


@dataclass
class Results:
    """All that was measured so far.

    Attributes:
        machine: Where, in words.
        blocks: The size of the model.
        commands: By name, then by number of workers.
        starts: The small runs, by name.
        sizes: Bytes that the speed of a command is about, by name.
        copies: Seconds of each ``cp -r`` with its sync, by what was copied.
    """

    machine: str
    blocks: tuple[int, int]
    commands: dict[str, dict[int, Result]] = field(default_factory=dict)
    starts: dict[str, Result] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    copies: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Results":
        """What ``json.dumps(asdict(...))`` wrote."""
        read = json.loads(text)
        commands = {
            name: {int(count): Result(**one) for count, one in by_count.items()}
            for name, by_count in read["commands"].items()
        }
        starts = {name: Result(**one) for name, one in read["starts"].items()}
        return cls(read["machine"], tuple(read["blocks"]), commands, starts, read["sizes"], read["copies"])


def cases(*, has_gpu: bool) -> list[Case]:
    """In an order in which every input is there: the last build is what verify reads."""
    base = ("build-nvfp4", "--preset", "flux1-dev", "--base", "BASE", "--output", "BUILT", "--verify")
    build = (*base[:-1], "--export", "EXPORT", "--verify")
    verify = ("verify", "BUILT")
    found = [
        Case("quantize the base, CPU", (*base, "off"), ("BASE",), "BUILT"),
        Case("quantize the base, GPU", (*base, "off", "--device", "cuda"), ("BASE",), "BUILT"),
        Case("build from an export, --verify off, CPU", (*build, "off"), ("BUILT",), "BUILT"),
        Case("build from an export, closing verify, CPU", (*build, "cpu"), ("BUILT",), "BUILT"),
        Case("build from an export, closing verify, GPU", (*build, "auto", "--device", "cuda"), ("BUILT",), "BUILT"),
        Case("verify --base, every byte, CPU", (*verify, "--base", "BASE", "--device", "cpu"), ("BUILT", "BASE")),
        Case("verify --base, every byte, GPU", (*verify, "--base", "BASE", "--device", "cuda"), ("BUILT", "BASE")),
        Case("verify --base, 8 rows a module, CPU", (*verify, "--base", "BASE", "--device", "cpu", "--sample", "8"),
             ("BUILT",)),
        Case("verify by record, CPU", (*verify, "--device", "cpu"), ("BUILT",)),
        Case("convert --to comfyui, CPU", ("convert", "EXPORT", "OUT", "--to", "comfyui"), ("OUT",), "OUT"),
        Case("swap-nibbles, CPU", ("swap-nibbles", "EXPORT", "OUT"), ("OUT",), "OUT"),
        Case("unswizzle-scales, CPU", ("unswizzle-scales", "SWIZZLED", "OUT"), ("OUT",), "OUT"),
    ]  # fmt: skip
    return [one for one in found if has_gpu or not one.name.endswith("GPU")]


def shapes(blocks: tuple[int, int], narrow: int = 1) -> dict[str, tuple[int, ...]]:
    """Of the base's tensors, by name."""
    listed = json.loads(HEADERS.read_text())["tensors"]
    counts = {"{0-18}": blocks[0], "{0-37}": blocks[1]}
    renamed = {}
    for name, entry in listed.items():
        for braces, count in counts.items():
            name = name.replace(braces, f"{{0-{count - 1}}}")
        renamed[name] = entry
    return {name: tuple(one // narrow for one in shape) for name, (_, shape) in expand(renamed).items()}


@cache
def pool() -> np.ndarray:
    """Bits of normally distributed BF16, smaller than the largest value, that all weights are cut from."""
    generator, parts = np.random.SeedSequence(22).spawn(CORES), np.array_split(np.empty(POOL, np.uint16), CORES)

    def fill(seed: np.random.SeedSequence, part: np.ndarray) -> None:
        values = np.random.default_rng(seed).standard_normal(len(part), np.float32) * np.float32(0.02)
        np.clip(values, -LARGEST, LARGEST, out=values)
        part[:] = values.view(np.uint32) >> 16

    with ThreadPoolExecutor(CORES) as threads:
        list(threads.map(fill, generator, parts))
    return np.concatenate(parts)


def make(folder: Path, blocks: tuple[int, int], narrow: int = 1) -> None:
    """Write base and export; a folder that is there is whole."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    base, export = partial / "BASE", partial / "EXPORT"
    found = shapes(blocks, narrow)
    config = json.loads(HEADERS.read_text())["config"] | {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    write_sparse(base, [TensorSpec(name, "BF16", shape) for name, shape in found.items()], config)
    write_sparse(export, list(_packed(found)), config | {"quantization_config": _QUANTIZATION})
    with CheckpointReader(base) as reads, CheckpointReader(export) as packs:
        given, packed = dict(reads.tensors), dict(packs.tensors)
    values = pool()
    # BF16 has 128 values from a power of two to the next.
    one = int(np.float32(LARGEST).view(np.uint32)) >> 16
    largest = {
        name: one + number % 128 for number, name in enumerate(dict.fromkeys(FUSED.sub("", each) for each in given))
    }

    def fill(info: TensorInfo, place: int) -> None:
        weight = values[place : place + info.num_bytes // 2].copy()
        weight[0] = largest[FUSED.sub("", info.name)]
        _write(base, info, weight.data)
        if packed[info.name].dtype == "BF16":
            _write(export, packed[info.name], weight.data)
            return
        weights = from_bytes(weight.data.cast("B"), "BF16", info.shape)
        scale = shared_global_scale([weights[:1, :16]])
        codes, scales = quantize_nvfp4(weights, scale)
        module = info.name.removesuffix(".weight")
        _write(export, packed[info.name], to_bytes(codes))
        _write(export, packed[f"{module}.weight_scale"], to_bytes(scales))
        _write(export, packed[f"{module}.weight_scale_2"], to_bytes(scale))
        _write(export, packed[f"{module}.input_scale"], np.float32(INPUT_SCALE).tobytes())

    # The largest first, so that no thread has one left at the end.
    infos = sorted(given.values(), key=lambda info: -info.num_bytes)
    places = [number * 7919 * 16 % (POOL - info.num_bytes // 2) for number, info in enumerate(infos)]
    with ThreadPoolExecutor(CORES) as threads, torch_on_one_thread():
        list(threads.map(fill, infos, places))
    partial.rename(folder)


def _write(folder: Path, info: TensorInfo, data: "bytes | memoryview") -> None:
    with (folder / info.file).open("r+b", buffering=0) as file:
        file.seek(info.start)
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left) :]


class Bench:
    """Runs commands over one set of inputs; outputs lie beside these."""

    def __init__(self, folder: Path) -> None:
        """Of base and export in this folder."""
        self._folder = folder

    def path(self, name: str) -> Path:
        """A folder of the inputs or outputs."""
        return self._folder / name

    def mopt(self, case: Case, workers: int) -> Measured:
        """One run; what it wrote before is gone, and nothing waits for the disk when it begins."""
        self._provide(case)
        if case.written is not None:
            shutil.rmtree(self.path(case.written), ignore_errors=True)
        os.sync()
        names = ("BASE", "EXPORT", "SWIZZLED", "BUILT", "OUT")
        words = [str(self.path(word)) if word in names else word for word in case.arguments]
        return run_mopt(*words, "--workers", str(workers))

    def copy(self, name: str) -> float:
        """Seconds of ``cp -r`` of a folder, its sync included."""
        shutil.rmtree(self.path("copy"), ignore_errors=True)
        os.sync()
        seconds = run(["cp", "-r", str(self.path(name)), str(self.path("copy"))]).seconds
        shutil.rmtree(self.path("copy"))
        return seconds

    def clean(self) -> None:
        """Remove all but the inputs."""
        for name in ("SWIZZLED", "BUILT", "OUT", "copy"):
            shutil.rmtree(self.path(name), ignore_errors=True)

    def _provide(self, case: Case) -> None:
        """Make room for a command, and what it reads."""
        if case.written == "OUT":
            shutil.rmtree(self.path("BUILT"), ignore_errors=True)
        else:
            for name in ("OUT", "SWIZZLED"):
                shutil.rmtree(self.path(name), ignore_errors=True)
        base, export = str(self.path("BASE")), str(self.path("EXPORT"))
        if "SWIZZLED" in case.arguments and not self.path("SWIZZLED").exists():
            run_mopt("unswizzle-scales", export, str(self.path("SWIZZLED")), "--reverse", "--workers", str(CORES))
        if case.written is None and not self.path("BUILT").exists():
            words = ["--preset", "flux1-dev", "--base", base, "--export", export, "--output", str(self.path("BUILT"))]
            run_mopt("build-nvfp4", *words, "--verify", "off", "--workers", str(CORES))


def measure(
    results: Results, bench: Bench, small: Bench, chosen: Sequence[Case], counts: Sequence[int], runs: int, end: float
) -> Iterator[str]:
    """Fill the results, as long as there is time; says what was done, or left out.

    Args:
        results: Are added to; a call that went before may have filled some.
        bench: Of the full size.
        small: Of the small one.
        chosen: The commands.
        counts: Numbers of workers, in the order in which they are measured.
        runs: Of each.
        end: On the clock of ``time.monotonic``.
    """
    for case in chosen:
        if case.name not in results.starts:
            small.mopt(case, 1)  # fills caches: of the libraries' pages, of bytecode, of kernels that are compiled
            results.starts[case.name] = Result()
            results.starts[case.name].add(small.mopt(case, 1))
            yield f"start-up of {case.name}: {results.starts[case.name].seconds[0]:.2f} s"
    small.clean()
    for number in range(1, runs + 1):
        for count in counts:
            is_copied = dict.fromkeys(("BUILT", "OUT"), False)
            for case in chosen:
                found = results.commands.setdefault(case.name, {})
                if len(found.get(count, Result()).seconds) >= number:
                    continue
                if time.monotonic() + _expected(found, count) > end:
                    yield f"{case.name}, {count} workers: no time left"
                    continue
                done = bench.mopt(case, count)
                found.setdefault(count, Result()).add(done)
                results.sizes[case.name] = sum(num_bytes(bench.path(name)) for name in case.counted)
                yield f"{case.name}, {count} workers: {done.seconds:.2f} s"
                copies = results.copies.setdefault(case.written, []) if case.written else []
                if case.written and not is_copied[case.written] and len(copies) < runs:
                    is_copied[case.written] = True
                    copies.append(bench.copy(case.written))
                    yield f"cp -r of the same: {copies[-1]:.2f} s"
    bench.clean()


def _expected(found: Mapping[int, Result], count: int) -> float:
    """Seconds of the next run at most, by those with other numbers of workers; nothing is known of the first."""
    return min((max(one.seconds) * max(1.0, other / count) for other, one in found.items() if one.seconds), default=0.0)


def table(results: Results, chosen: Iterable[Case]) -> list[str]:
    """One row for every command and number of workers."""
    lines = [
        "| command | workers | s | start-up, s | of which | GB | GB/s | x cp | MB a worker beyond start-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in chosen:
        for count, found in sorted(results.commands.get(case.name, {}).items()):
            start = results.starts[case.name]
            seconds, size = statistics.median(found.seconds), results.sizes[case.name]
            peak = (statistics.median(found.peaks) - statistics.median(start.peaks)) / count / 1e6
            copies = results.copies.get(case.written or "", [])
            ratio = f"{seconds / statistics.median(copies):.2f}" if copies else ""
            lines.append(
                f"| {case.name} | {count} | {seconds:.2f} | {statistics.median(start.seconds):.2f} | {_phases(found)} "
                f"| {size / 1e9:.2f} | {size / seconds / 1e9:.2f} | {ratio} | {peak:.0f} |"
            )
    for kind, copies in ((kind, copies) for kind, copies in results.copies.items() if copies):
        what = "an output of build-nvfp4" if kind == "BUILT" else "an output of a rewrite"
        lines.append(f"| `cp -r` of {what}, sync | | {statistics.median(copies):.2f} | | | | | 1 | |")
    return lines


def written_out(results: Results, every: Iterable[Case]) -> str:
    """The table with what it is about."""
    double, single = results.blocks
    about = (
        f"{results.machine}; {double} double and {single} single blocks; medians. GB are those of the output; for "
        "quantizing, those of the base; for verify, those that are compared."
    )
    return "\n".join(["", *table(results, every), "", about, ""])


def _phases(found: Result) -> str:
    names = dict.fromkeys(name for phases in found.phases for name in phases)
    medians = {name: statistics.median(phases.get(name, 0.0) for phases in found.phases) for name in names}
    return ", ".join(f"{name} {value:.1f}" for name, value in medians.items() if value >= 0.1)


def panels(results: Results, chosen: Iterable[Case]) -> list[Panel]:
    """Speed by workers, one panel a command; beside it the speed at which cp would write the same."""
    found = []
    for case in chosen:
        size = results.sizes.get(case.name, 0)
        by_count = sorted(results.commands.get(case.name, {}).items())
        lines = [Line("mopt", [(count, size / statistics.median(one.seconds) / 1e9) for count, one in by_count])]
        if copies := results.copies.get(case.written or ""):
            speed = size / statistics.median(copies) / 1e9
            lines.append(Line("cp -r and sync", [(count, speed) for count, _ in by_count]))
        if by_count:
            found.append(Panel("workers", f"GB/s, {case.name}", True, lines))
    return found


def main() -> None:
    """Print the table, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where inputs are made, and kept; default: a temporary folder")
    parser.add_argument("--blocks", type=int, nargs=2, default=BLOCKS, help="double and single (default 19 38)")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2, 4, 8, 16), help="those up to the cores count")
    parser.add_argument("--only", nargs="+", default=(), help="commands whose names have one of these words in them")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, medians are taken (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="for all, inputs included (default %(default)s)")
    parser.add_argument("--json", type=Path, help="what was measured; a file of the same machine and size is added to")
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--plot", type=Path, help="speed by workers as SVG")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    blocks = (arguments.blocks[0], arguments.blocks[1])
    every = cases(has_gpu=torch.cuda.is_available())
    chosen = [one for one in every if not arguments.only or any(word in one.name for word in arguments.only)]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    results = Results(f"{machine()}, torch {torch.__version__}{gpu}", blocks)
    if arguments.json is not None and arguments.json.exists():
        before = Results.parse(arguments.json.read_text())
        if (before.machine, before.blocks) != (results.machine, results.blocks):
            raise SystemExit(f"{arguments.json}: of another machine or size: {before.machine}, {before.blocks}")
        results = before
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mopt-full-"))
    full, small = (folder / name for name in ("full-{}-{}".format(*blocks), "small"))
    begin = time.monotonic()
    try:
        make(small, (1, 1), NARROW)
        make(full, blocks)
        warm(full)
        os.sync()
        print(f"inputs: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        counts = sorted({one for one in arguments.workers if one <= CORES}, reverse=True)
        for line in measure(results, Bench(full), Bench(small), chosen, counts, arguments.runs, end):
            print(line, file=sys.stderr, flush=True)
            # At once: what was measured stands if a later command fails.
            _save(results, every, arguments.json, arguments.markdown, arguments.plot)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    print(written_out(results, every))


def _save(
    results: Results, every: Sequence[Case], to_json: Path | None, markdown: Path | None, plot: Path | None
) -> None:
    if to_json is not None:
        to_json.write_text(json.dumps(asdict(results), indent=1))
    if markdown is not None:
        markdown.write_text(written_out(results, every), encoding="utf-8")
    if plot is not None and results.commands:
        plot.write_text(draw(panels(results, every)), encoding="utf-8")


if __name__ == "__main__":
    main()
