"""How time and memory of ``mopt swap-nibbles`` grow with bytes and with tensors.

    python scripts/bench/bench_growth.py [--quick] [--dir FOLDER] [--runs N] [--plot docs/growth.svg]

The inputs are NVFP4 checkpoints by their headers and holes by their bytes: no disk for them, and reading zeros costs
what the page cache costs. Without --base the command does as told, so that zeros are as good as
weights. Two series, each with one worker and with as many as mopt takes by itself:

* the same 1 GB in 10 to 10,000 tensors;
* tensors of the same size, 1 to 24 GB of them (--quick: both series with 1/50 of the bytes).

Seconds include a sync of what was written; what the same command takes for 10 small tensors is taken off, in time and
in memory. Each output is removed at once, so that the largest of them is the room that is needed.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benching import RUNS, machine, run_mopt
from growth_plot import Line, Panel, draw
from sparse_flux1 import _QUANTIZATION, write_sparse

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.run.workers import default_workers

COLUMNS = 3072
TENSORS_PER_MODULE = 5  # as specs() makes them
ROWS = 12288  # of the second series: the largest weights of FLUX.1


@dataclass(frozen=True)
class Point:
    """One size of one series.

    Attributes:
        tensors: How many, scales and biases included.
        num_bytes: Of all tensors.
        seconds: For each number of workers, start-up taken off.
        peaks: Bytes, likewise.
    """

    tensors: int
    num_bytes: int
    seconds: tuple[float, ...]
    peaks: tuple[float, ...]


def specs(modules: int, rows: int) -> list[TensorSpec]:
    """Modules as ModelOpt exports them: packed weight, its two scales, the input's, and a bias."""
    found: list[TensorSpec] = []
    for number in range(modules):
        name = f"transformer_blocks.{number}.ff.net.2"
        found += [
            TensorSpec(f"{name}.weight", "U8", (rows, COLUMNS // 2)),
            TensorSpec(f"{name}.weight_scale", "F8_E4M3", (rows, COLUMNS // 16)),
            TensorSpec(f"{name}.weight_scale_2", "F32", ()),
            TensorSpec(f"{name}.input_scale", "F32", ()),
            TensorSpec(f"{name}.bias", "BF16", (rows,)),
        ]
    return found


def row_bytes() -> int:
    """Of one output feature: codes, scales, bias."""
    return COLUMNS // 2 + COLUMNS // 16 + 2


def series(quick: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Numbers of modules and rows: of as many bytes in more tensors, and of more tensors of one size."""
    share = 50 if quick else 1
    by_tensors = [
        (count // TENSORS_PER_MODULE, round(1e9 / share / row_bytes() / (count // TENSORS_PER_MODULE)))
        for count in (10, 100, 1_000, 10_000)
    ]
    rows = ROWS // 4 if quick else ROWS
    by_bytes = [(round(gb * 1e9 / share / rows / row_bytes()), rows) for gb in (1, 2, 4, 8, 16, 24)]
    return by_tensors, by_bytes


def measure(folder: Path, sizes: Sequence[tuple[int, int]], workers: Sequence[int], runs: int) -> list[Point]:
    """Time every size with every number of workers, start-up again before each; of that the median of all is taken."""
    small = folder / "small"
    if not small.exists():
        write_sparse(small, specs(2, 16), {"quantization_config": _QUANTIZATION})
    starts: dict[int, list[tuple[float, int]]] = {count: [] for count in workers}
    found: list[dict[int, list[tuple[float, int]]]] = []
    for modules, rows in sizes:
        write_sparse(folder / "source", specs(modules, rows), {"quantization_config": _QUANTIZATION})
        found.append({count: [] for count in workers})
        # Unmeasured: virtual disks make room for blocks when they are written for the first time.
        _swap(folder / "source", folder / "out", default_workers())
        for _ in range(runs):
            for count in workers:
                starts[count].append(_swap(small, folder / "out", count))
                found[-1][count].append(_swap(folder / "source", folder / "out", count))
        shutil.rmtree(folder / "source")
        print(f"{modules} modules of {rows} rows: {found[-1]}", file=sys.stderr, flush=True)
    points = []
    for size, measured in zip(sizes, found, strict=True):
        seconds, peaks = (
            [_middle(measured[count], which) - _middle(starts[count], which) for count in workers] for which in (0, 1)
        )
        tensors = specs(*size)
        points.append(Point(len(tensors), sum(one.num_bytes for one in tensors), tuple(seconds), tuple(peaks)))
    return points


def _middle(measured: Sequence[tuple[float, int]], which: int) -> float:
    return statistics.median(one[which] for one in measured)


def _swap(source: Path, out: Path, workers: int) -> tuple[float, int]:
    """Seconds and peak memory, by the command's own report; the output is gone.

    The source is put out of the page cache first: the largest does not fit in, and one that is there already would be
    read for nothing by the next.
    """
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = run_mopt("swap-nibbles", str(source), str(out), "--workers", str(workers))
    shutil.rmtree(out)
    return done.seconds, json.loads(done.printed)["peak_rss_bytes"]


def fit(across: Sequence[float], up: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: value at nothing, slope, and the largest deviation as a part of the line's value there."""
    slope, start = statistics.linear_regression(across, up)
    return (
        start,
        slope,
        max(abs(y - start - slope * x) / abs(start + slope * x) for x, y in zip(across, up, strict=True)),
    )


def table(points: Sequence[Point], workers: Sequence[int]) -> list[str]:
    """One row for every size and number of workers."""
    lines = ["| tensors | GB | workers | seconds | GB/s | ms per tensor | peak MB beyond start-up |"]
    lines.append("|---|---|---|---|---|---|---|")
    for point in points:
        for count, seconds, peak in zip(workers, point.seconds, point.peaks, strict=True):
            lines.append(
                f"| {point.tensors:,} | {point.num_bytes / 1e9:.2f} | {count} | {seconds:.2f} "
                f"| {point.num_bytes / 1e9 / seconds:.2f} | {1000 * seconds / point.tensors:.2f} | {peak / 1e6:.0f} |"
            )
    return lines


def lines_of(points: Sequence[Point], workers: Sequence[int], across: Callable[[Point], float], unit: str) -> list[str]:
    """The least-squares line of each number of workers, in words."""
    found = []
    for number, count in enumerate(workers):
        start, slope, worst = fit([across(point) for point in points], [point.seconds[number] for point in points])
        found.append(
            f"{count} worker{'s' * (count > 1)}: {start:.2f} s and {slope:.3g} s for each {unit}; "
            f"largest deviation {worst:.0%}."
        )
    return found


def panels(by_tensors: Sequence[Point], by_bytes: Sequence[Point], workers: Sequence[int]) -> list[Panel]:
    """Time and memory, against tensors and against bytes."""

    def gigabytes(point: Point) -> float:
        return point.num_bytes / 1e9

    found = []
    for points, across, label, log in (
        (by_tensors, lambda point: point.tensors, "tensors (same bytes)", True),
        (by_bytes, gigabytes, "GB (tensors of one size)", False),
    ):
        for label_up, up in (
            ("seconds", lambda p, n: p.seconds[n]),
            ("peak MB beyond start-up", lambda p, n: p.peaks[n] / 1e6),
        ):
            drawn = [
                Line(f"{count} worker{'s' * (count > 1)}", [(across(point), up(point, n)) for point in points])
                for n, count in enumerate(workers)
            ]
            found.append(Panel(label, label_up, log, drawn))
    return found


def main() -> None:
    """Print the tables, and draw them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1/50 of the bytes")
    parser.add_argument("--dir", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, medians are taken (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    by_tensors, by_bytes = series(arguments.quick)
    workers = sorted({1, default_workers()})
    folder = Path(tempfile.mkdtemp(prefix="mopt-growth-", dir=arguments.dir))
    try:
        need = max(modules * rows * row_bytes() for modules, rows in [*by_tensors, *by_bytes]) * 1.05
        free = shutil.disk_usage(folder).free
        if free < need:
            raise SystemExit(
                f"{folder.parent}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give --dir"
            )
        more_tensors = measure(folder, by_tensors, workers, arguments.runs)
        more_bytes = measure(folder, by_bytes, workers, arguments.runs)
    finally:
        shutil.rmtree(folder)
    print("\n".join(["", *table(more_tensors, workers), ""]))
    print("\n\n".join([*lines_of(more_tensors, workers, lambda point: point.tensors / 1000, "1,000 tensors"), ""]))
    print("\n".join([*table(more_bytes, workers), ""]))
    print("\n\n".join([*lines_of(more_bytes, workers, lambda point: point.num_bytes / 1e9, "GB"), ""]))
    print(f"{machine()}, {arguments.runs} runs each.")
    if arguments.plot is not None:
        arguments.plot.write_text(draw(panels(more_tensors, more_bytes, workers)), encoding="utf-8")


if __name__ == "__main__":
    main()
