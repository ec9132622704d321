"""Figures of the commands on a machine with a CUDA GPU: builds that end with verify, and verify itself.

    python scripts/gpu/verify_gpu_cli.py docs/verify-h100-commands

makes a seeded transformer with the width of FLUX.1 [dev] and 2 + 2 blocks, lets ModelOpt export it as NVFP4 and as FP8,
builds both with their preset and verifies what was built. Writes a .json and a .md. Needs the ``modelopt`` extra and a
GPU; --tiny tries the script out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from make_export import make_family
from tiny_models import FAMILIES
from verify_gpu import WIDTH

MAIN = "from modelopt_convert.cli import main; main()"
HEAD = """# The commands on one {gpu}

Written by `scripts/gpu/verify_gpu.sh`; do not edit. torch {torch}, CUDA {cuda}, compute capability {capability}. Seeded
weights, real ModelOpt exports, {size} of base. Seconds are wall clock, the start of Python and torch included.

| command | exit | verdict | seconds | of which verify | peak memory | peak GPU memory | native kernels |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Make the exports, run the commands, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="path of both files without their suffix")
    parser.add_argument("--tiny", action="store_true", help="a small model in place of one of full width")
    arguments = parser.parse_args()
    family = FAMILIES["flux1"]
    if not arguments.tiny:
        family = replace(family, config={**family.config, **WIDTH})
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        make_family(family, ["nvfp4", "fp8"], room)
        runs = [one for algorithm in ("nvfp4", "fp8") for one in _runs(room, algorithm)]
        base_bytes = sum(path.stat().st_size for path in (room / "base").rglob("*.safetensors"))
    arguments.output.with_suffix(".json").write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n", "utf-8")
    arguments.output.with_suffix(".md").write_text(_markdown(runs, base_bytes), "utf-8")


def _runs(room: Path, algorithm: str) -> list[dict[str, Any]]:
    command = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}[algorithm]
    out, base = room / f"out-{algorithm}", room / "base"
    words = [
        [command, "--preset", "flux1-dev", "--export", room / algorithm, "--base", base, "--output", out],
        ["verify", out],
        ["verify", out, "--base", base],
        ["verify", out, "--base", base, "--backend", "all"],
        ["verify", out, "--base", base, "--sample", "all"],
        ["verify", out, "--device", "cpu"],
        ["verify", out, "--require", "native"],
    ]
    return [_run(room, [str(word) for word in one]) for one in words]


def _run(room: Path, words: list[str]) -> dict[str, Any]:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words, "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begin
    report = json.loads(done.stdout)
    found = report["verify"] or {}
    return {
        "command": "mopt " + " ".join(words).replace(f"{room}/", ""),
        "exit_code": done.returncode,
        "error": (report["error"] or {}).get("message", "").replace(f"{room}/", ""),
        "seconds": round(seconds, 2),
        "timings_s": report["timings_s"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "peak_gpu_bytes": found.get("peak_gpu_bytes"),
        "verdict": found.get("verdict"),
        "statement": found.get("statement"),
        "native_executed": found.get("native_executed"),
        "device": found.get("device"),
        "levels": {level["level"]: level["status"] for level in found.get("levels", [])},
        "ran": [f"{one['name']} ({one['kind']})" for one in found.get("backends", []) if one["modules"]],
        "backends": {
            f"{one['name']} ({one['kind']})": one["reason"] or one["status"] for one in found.get("backends", [])
        },
    }


def _markdown(runs: list[dict[str, Any]], base_bytes: int) -> str:
    device = next((run["device"] for run in runs if (run["device"] or {}).get("capability")), runs[0]["device"])
    head = HEAD.format(
        gpu=device["name"],
        torch=device["torch"],
        cuda=device["cuda"],
        capability=device["capability"],
        size=f"{base_bytes / 1e9:.2f} GB",
    )
    rows = [
        f"| `{run['command']}` | {run['exit_code']} | {run['verdict']} | {run['seconds']} "
        f"| {run['timings_s'].get('verify', '')} | {_size(run['peak_rss_bytes'])} | {_size(run['peak_gpu_bytes'])} "
        f"| {run['native_executed']} |"
        for run in runs
    ]
    ran = [
        f"- `{run['command']}`: levels {', '.join(f'{name} {status}' for name, status in run['levels'].items())}; "
        f"backends {', '.join(run['ran']) or 'none'}"
        for run in runs
    ]
    return head + "\n".join(rows) + "\n\nWhat ran:\n\n" + "\n".join(ran) + "\n"


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
