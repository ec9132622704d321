"""Memory that convert-fp8 takes: neither the model nor the checkpoint is ever in it as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

from faults import SHARD
from root import ROOT

# Makes old exports with a checkpoint, a small one first, and prints by how many MB a large one raises the peak.
MEMORY = """
import json, sys
from pathlib import Path
import torch
from faults import write_transformer
from fp8_support import QUANTIZATION_CONFIG, convert, save_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def make(room, count, n):
    tensors = {f"blocks.{k}.lin.weight": torch.zeros(n, n, dtype=torch.bfloat16) for k in range(count)}
    config = {"_class_name": "Sparse", "quantization_config": QUANTIZATION_CONFIG}
    state = dict(tensors)
    for k in range(count):
        for kind in ("weight", "input"):
            state[f"blocks.{k}.lin.{kind}_quantizer._amax"] = torch.tensor(1.0, dtype=torch.bfloat16)
    write_transformer(room / "export", tensors, config)
    save_checkpoint(room / "transformer.pt", state)

room = Path(sys.argv[2])
if sys.argv[1] == "make":
    make(room / "small", 2, 256)
    make(room / "large", 60, 2048)
else:
    found = []
    for name in ("small", "large"):
        paths = room / name / "export", None, room / name / "out", "--checkpoint", room / name / "transformer.pt"
        outcome = convert(*paths, preset="none")
        assert outcome.exit_code == 0, outcome.stderr
        found.append(peak())
    print(json.dumps(found[1] - found[0]))
"""


def test_memory_does_not_grow_with_the_model_or_the_checkpoint(tmp_path: Path) -> None:
    """503 MB of weights and as much of .pt, of which only the amax are touched; other builders hold it all."""
    paths = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for step in ("make", "run"):
        command = [sys.executable, "-c", paths + MEMORY, step, str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert found.returncode == 0, found.stderr
    assert (tmp_path / "large" / "out" / SHARD).stat().st_size > 240_000_000
    assert json.loads(found.stdout.splitlines()[-1]) < 250_000_000
