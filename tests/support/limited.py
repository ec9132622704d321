"""mopt in a process of its own, under limits of memory and open files: how it ended, and what it took."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from root import ROOT

from modelopt_convert.checkpoint.header import TensorSpec, build_header

ADDRESS_SPACE = 8 << 30  # torch alone takes half of it
_CHILD = """
import resource, sys
from pathlib import Path
space, soft, hard = map(int, sys.argv[1:4])
sys.argv[1:4] = []
resource.setrlimit(resource.RLIMIT_AS, (space, space))
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from modelopt_convert.cli import main
try:
    main()
finally:
    sys.stdout.flush()
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")),
          file=sys.stderr)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        exit_code: Negative for a signal.
        error_code: Of the report, if it failed.
        message: Of the error, with its hint.
        stdout: As it was.
        stderr: As it was.
        peak_mb: Largest resident memory.
        seconds: Wall time.
    """

    exit_code: int
    error_code: str | None
    message: str
    stdout: str
    stderr: str
    peak_mb: int
    seconds: float

    @property
    def figures(self) -> dict[str, int | str]:
        """What is to be noted."""
        return {"exit_code": self.exit_code, "peak_mb": self.peak_mb, "milliseconds": round(self.seconds * 1000)}


def run_limited(*arguments: str | Path, files: tuple[int, int] = (1024, 4096), space: int = ADDRESS_SPACE) -> Ended:
    """Run mopt with --json under limits of address space and of open files (soft, hard)."""
    words = [str(space), *map(str, files), *map(str, arguments), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.monotonic() - began
    peak = re.search(r"VmHWM:\s+(\d+) kB", run.stderr)
    error = (json.loads(run.stdout)["error"] or {}) if run.stdout.startswith("{") else {}
    return Ended(
        run.returncode,
        error.get("code"),
        f"{error.get('message')}\n{error.get('hint')}",
        run.stdout,
        run.stderr,
        int(peak[1]) // 1000 if peak else -1,
        seconds,
    )


def sparse_file(path: Path, specs: list[TensorSpec]) -> None:
    """A safetensors file with a right header, and zeros that take no room."""
    head, _, size = build_header(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def sparse_checkpoint(folder: Path, shards: dict[str, list[TensorSpec]], config: dict[str, object]) -> Path:
    """A checkpoint folder of sparse files, with an index if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, specs in shards.items():
        sparse_file(folder / name, specs)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
