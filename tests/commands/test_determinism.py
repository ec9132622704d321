"""The same input gives the same bytes: whatever the threads, the hash seed, the folder one stands in, and the umask."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from figures import note
from root import ROOT
from support import tree

_BUILDS = """
import os, sys
from modelopt_convert.cli import app
umask, inputs, output = int(sys.argv[1], 8), sys.argv[2], sys.argv[3]
os.umask(umask)
base = f"{inputs}/base"
for words in (
    ["build-nvfp4", "--preset", "flux1-dev", "--export", f"{inputs}/nvfp4", "--base", base, "--output",
     f"{output}/nvfp4", "--max-shard-size", "800kB"],
    ["build-nvfp4", "--preset", "flux1-dev", "--base", base, "--output", f"{output}/uncalibrated"],
    ["convert-fp8", "--preset", "flux1-dev", "--export", f"{inputs}/fp8", "--base", base, "--output", f"{output}/fp8"],
    ["unswizzle-scales", "--reverse", f"{inputs}/nvfp4", f"{output}/rewritten"],
):
    app(words, standalone_mode=False)
"""


@dataclass(frozen=True)
class Way:
    """In what a build may differ and its output may not."""

    threads: int
    seed: int
    umask: str
    cwd: str


WAYS = (Way(1, 0, "022", "."), Way(4, 1, "077", "elsewhere"))


def test_trees_are_equal_to_the_byte(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    trees = []
    for number, way in enumerate(WAYS):
        output = tmp_path / f"outputs{number}"
        output.mkdir()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(way.threads),
            "MKL_NUM_THREADS": str(way.threads),
            "PYTHONHASHSEED": str(way.seed),
            "PYTHONPATH": str(ROOT),
        }
        words = [sys.executable, "-c", _BUILDS, way.umask, str(exports), str(output)]
        run = subprocess.run(
            words, capture_output=True, text=True, env=environment, cwd=tmp_path / way.cwd, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found = {path.name: tree(path) for path in sorted(output.iterdir())}
        assert found.keys() == {"nvfp4", "uncalibrated", "fp8", "rewritten"}
        assert all(len(files) >= 3 for files in found.values())
        trees.append(found)
    for name, files in trees[0].items():
        differing = [file for file in files if trees[1][name].get(file) != files[file]]
        assert trees[1][name].keys() == files.keys() and not differing, (name, differing)
    note(17, trees_equal=len(trees[0]), files=sum(map(len, trees[0].values())))
