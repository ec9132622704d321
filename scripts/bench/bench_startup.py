"""Start-up of mopt against an empty Typer program, in one run: medians of interleaved runs, as ratios.

    python scripts/bench/bench_startup.py

Targets: `mopt --help` within 1.5, usage errors and refusals within 2, `inspect` and a dry run of a full-size FLUX.1-dev
(sparse files with its real names and shapes) within about a second and 50 MB beyond start-up. Typer imports pydantic as
soon as a command has an option to convert, so there are two empty programs to compare with: one that prints its help,
and one whose option is read and whose command then ends with an exit code, as a refusal does.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RUNS = 15
EMPTY = """
import typer
app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
@app.command()
def one(name: str = "x") -> None: raise typer.Exit(3)
@app.command()
def two(name: str = "x") -> None: "Two."
app()
"""
MAIN = "from modelopt_convert.cli import main; main()"
_PEAK = """
import atexit, sys
from pathlib import Path
atexit.register(lambda: print(next(line for line in Path("/proc/self/status").read_text().splitlines()
                                   if line.startswith("VmHWM:")), file=sys.stderr))
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: In words.
        code: Python code.
        arguments: Its ``sys.argv[1:]``.
        exit_code: With which it must end.
        start: Code and arguments of the same without the work, to tell its memory; none where there is no work.
    """

    name: str
    code: str
    arguments: tuple[str, ...]
    exit_code: int
    start: tuple[str, ...] = ()


def table_rows(folder: Path) -> list[Row]:
    """The empty programs first, then what is compared with them.

    Args:
        folder: Holds ``base`` and ``export`` by ``sparse_flux1.py``; a damaged copy is put beside them.
    """
    base, export, damaged, gone = (str(folder / name) for name in ("base", "export", "damaged", "gone"))
    _damage(Path(damaged))
    build = ("build-nvfp4", "--preset", "flux1-dev", "--base", base, "--export")
    started = (MAIN, "inspect", gone)
    return [
        Row("empty Typer program: `--help`", EMPTY, ("--help",), 0),
        Row("empty Typer program: a command with an option", EMPTY, ("one", "--name", "y"), 3),
        Row("empty Typer program: unknown option", EMPTY, ("one", "--nosuch"), 2),
        Row("`mopt --help`", MAIN, ("--help",), 0),
        Row("`mopt build-nvfp4 --help`", MAIN, ("build-nvfp4", "--help"), 0),
        Row("usage error: unknown option", MAIN, ("build-nvfp4", "--nosuch"), 2),
        Row("usage error: missing argument", MAIN, ("push",), 2),
        Row("usage error: missing `--base`", MAIN, ("build-nvfp4",), 2),
        Row("refusal: unknown preset", MAIN, ("build-nvfp4", "--preset", "nosuch", "--export", export), 3),
        Row("refusal: no such export", MAIN, (*build, gone), 3),
        Row("refusal: OUT exists", MAIN, (*build, export, "--output", damaged), 4),
        Row("refusal: damaged header", MAIN, (*build, damaged, "--output", gone), 3),
        Row("refusal: `inspect` of a damaged header", MAIN, ("inspect", damaged), 3),
        Row("refusal: `verify` of a damaged header", MAIN, ("verify", damaged), 3),
        Row("refusal: `swap-nibbles` of nothing", MAIN, ("swap-nibbles", gone, f"{gone}-too"), 3),
        Row("refusal: `push` of nothing", MAIN, ("push", gone, "me/it"), 3),
        Row("`inspect`, 24 GB in BF16", MAIN, ("inspect", base), 0, started),
        Row("`inspect`, the same in NVFP4", MAIN, ("inspect", export), 0, started),
        Row("`build-nvfp4 --dry-run` of both", MAIN, (*build, export, "--output", gone, "--dry-run"), 0, started),
    ]


def _damage(folder: Path) -> None:
    """A checkpoint whose header ends in the middle."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    header = b'{"proj_out.weight":{"dtype":"BF16"'
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def rows() -> list[str]:
    """The lines of the table."""
    with tempfile.TemporaryDirectory() as name:
        from sparse_flux1 import make

        folder = Path(name)
        make(folder)
        # Bytecode is compiled once, as in an installed package, whatever the environment says.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        table = table_rows(folder)
        times: dict[str, list[float]] = {row.name: [] for row in table}
        for number in range(RUNS + 1):
            for row in table:
                seconds = _seconds(row, environment)
                if number:  # the first one compiles
                    times[row.name].append(seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        help_s, run_s = (median[row.name] for row in table[:2])
        lines = [
            "| command | median s | against an empty `--help` | against an empty command | peak MB beyond start-up |",
            "|---|---|---|---|---|",
        ]
        for row in table:
            seconds = median[row.name]
            more = ""
            if row.start:
                more = f"{_peak_mb((row.code, *row.arguments), environment) - _peak_mb(row.start, environment):.0f}"
            lines.append(f"| {row.name} | {seconds:.3f} | {seconds / help_s:.2f} | {seconds / run_s:.2f} | {more} |")
    return lines


def _seconds(row: Row, environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", row.code, *row.arguments], capture_output=True, env=environment)
    seconds = time.perf_counter() - begin
    if done.returncode != row.exit_code:
        raise SystemExit(f"{row.name}: exit code {done.returncode}: {done.stderr.decode()}")
    return seconds


def _peak_mb(command: tuple[str, ...], environment: dict[str, str]) -> float:
    """VmHWM is the process's own peak; what wait4 says would begin with that of whoever started it."""
    code, *arguments = command
    watched = [sys.executable, "-c", _PEAK + code, *arguments]
    done = subprocess.run(watched, capture_output=True, text=True, env=environment)
    return int(done.stderr.splitlines()[-1].split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print("\n".join(rows()))
