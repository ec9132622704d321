"""Start-up of mopt against an empty Typer program, in one run: medians of interleaved runs, as ratios.

    python scripts/bench_startup.py

Targets: `mopt --help` within 1.5, a usage error and a refusal within 2. The full-size plan is given in seconds too.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 15
EMPTY = """
import typer
app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
@app.command()
def one(name: str = "x") -> None: "One."
@app.command()
def two(name: str = "x") -> None: "Two."
app()
"""
MAIN = "from modelopt_convert.cli import main; main()"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        from sparse_flux1 import make

        make(Path(folder))
        build = ["build-nvfp4", "--preset", "flux1-dev", "--export", f"{folder}/export", "--base", f"{folder}/base"]
        commands = {
            "empty Typer program --help": [EMPTY, "--help"],
            "mopt --help": [MAIN, "--help"],
            "usage error": [MAIN, "build-nvfp4"],
            "refusal (no such export)": [MAIN, "build-nvfp4", "--export", "/nowhere", "--base", "/nowhere"],
            "plan of a full-size FLUX.1-dev": [MAIN, *build, "--output", f"{folder}/out", "--dry-run"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(RUNS):
            for name, arguments in commands.items():
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-c", *arguments], capture_output=True, check=False)
                times[name].append(time.perf_counter() - begin)
    empty = statistics.median(times["empty Typer program --help"])
    print("| command | median s | against an empty Typer program |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.3f} | {statistics.median(values) / empty:.2f} |")


if __name__ == "__main__":
    main()
