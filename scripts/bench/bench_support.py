"""What the benchmarks of quantization share: one command in a process of its own, and that two outputs are the same."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

RUNS = 3
MAIN = "from modelopt_convert.cli import main; main()"


def make_base(folder: Path, *, quick: bool, kinds: Collection[str] = ("base",)) -> Path:
    """A FLUX.1-shaped base of about 4 GB, or 200 MB; beside it its export, if that is among the kinds."""
    from bench import make

    make(folder, "quick" if quick else "full", kinds)
    return folder / "base"


def quantize(code: str, base: Path, out: Path, *more: str) -> tuple[float, dict[str, Any]]:
    """Seconds of ``build-nvfp4`` of inputs that are in the page cache, a sync included, and its report.

    The first output is kept as ``out.kept``; each further one must have the same bytes, and is removed.
    """
    for path in base.parent.glob("*/*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    words = ["build-nvfp4", "--preset", "flux1-dev", "--base", str(base), "--output", str(out), "--json", *more]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    os.sync()
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr}")
    kept = out.with_suffix(".kept")
    if kept.exists():
        _check_same(kept, out)
        shutil.rmtree(out)
    else:
        out.rename(kept)
    return seconds, json.loads(done.stdout)


def working_s(report: dict[str, Any]) -> float:
    """Seconds in which weights were measured or proven, quantized and written."""
    return sum(float(report["timings_s"].get(step, 0.0)) for step in ("measure", "prove", "stream"))


def _check_same(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir()), right
    different = [name for name in names if not filecmp.cmp(left / name, right / name, shallow=False)]
    assert not different, different
