"""What the benchmarks share: commands timed with a sync of what they wrote, their peak memory, a warm page cache."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "scripts" / "make"),
]  # this checkout's mopt, for whoever imports this, installed or not
RUNS = 3
# As where a package was installed by pip, which compiles it: half of the import of torch is compiling else.
_BYTECODE = tempfile.TemporaryDirectory(prefix="mopt-bytecode-")
MOPT = "from modelopt_convert.cli import main; main()"
# VmHWM is the process's own peak; what wait4 says would begin with that of whoever started it.
_WATCHED = """
import sys
from pathlib import Path
code, sys.argv = sys.argv[1], sys.argv[1:]
try:
    exec(compile(code, "measured", "exec"), {"__name__": "__main__"})
finally:
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")),
          file=sys.stderr)
"""


@dataclass(frozen=True)
class Measured:
    """One command.

    Attributes:
        seconds: A sync of everything written included.
        peak_bytes: Peak memory; 0 where it is not known.
        printed: What it said on stdout.
    """

    seconds: float
    peak_bytes: int
    printed: str


def run(command: Sequence[str]) -> Measured:
    """Run any command; its memory is not known."""
    return _measured(command)


def run_python(code: str, arguments: Sequence[str], *paths: Path) -> Measured:
    """Run Python code in a process of its own, with ``arguments`` as its ``sys.argv[1:]``.

    Args:
        code: Any, mopt's included: this checkout is the first place where imports are looked for.
        arguments: Of the code.
        paths: Where they are looked for next.
    """
    return _measured([sys.executable, "-c", _WATCHED, code, *arguments], *paths)


def run_mopt(*arguments: str) -> Measured:
    """Run a command of mopt; it prints its report."""
    return run_python(MOPT, [*arguments, "--json"])


def _measured(command: Sequence[str], *paths: Path) -> Measured:
    places = [str(ROOT), *map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": os.pathsep.join(places), "PYTHONPYCACHEPREFIX": _BYTECODE.name}
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    os.sync()
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    peak = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return Measured(seconds, int(peak.split()[1]) * 1024, done.stdout)


def num_bytes(folder: Path) -> int:
    """Size of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warm(*folders: Path) -> None:
    """Bring the files of folders into the page cache."""
    for path in (one for folder in folders for one in folder.rglob("*") if one.suffix in (".safetensors", ".pt")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def machine() -> str:
    """Where it ran, in words."""
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
