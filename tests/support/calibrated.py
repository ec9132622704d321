"""Calibrations of the tiny pipeline, and edits of them that stay whole."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from root import ROOT
from safetensors.torch import load_file, save_file
from support import Outcome, run_mopt
from torch import Tensor

from modelopt_convert.checkpoint.calibration import file_digest
from modelopt_convert.checkpoint.header import TensorSpec, parse_header
from modelopt_convert.checkpoint.record import digest_of, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.run.workers import torch_on_one_thread

TINY = ROOT / "tests" / "data" / "tiny_flux1"
PROMPTS = ("a red seven", "a green three", "a blue zero", "a yellow six")
STEPS, SIZE = 2, 32
LOOK = ("--size", str(SIZE), "--steps", str(STEPS))


def write_prompts(folder: Path) -> Path:
    """A file of the prompts."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


def calibrate(output: Path, *more: str | Path, base: Path = TINY, pipeline: Path = TINY) -> Outcome:
    """Run ``mopt calibrate`` on the tiny pipeline; the prompts lie beside OUTPUT."""
    prompts = output.parent / "prompts.txt"
    words = ("--pipeline", pipeline, "--prompts", prompts if prompts.exists() else write_prompts(output.parent))
    with torch_on_one_thread():
        return run_mopt("calibrate", base, *words, "--output", output, *LOOK, "--device", "cpu", *more)


def edit_calibration(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change calibration.json, and give it its digest in the record again."""
    said = json.loads((folder / "calibration.json").read_text())
    change(said)
    raw = json_bytes(said)
    (folder / "calibration.json").write_bytes(raw)
    specs, digests, metadata = list[TensorSpec](), dict[str, str](), dict[str, dict[str, str]]()
    for path in (folder / "stats.safetensors", folder / "compensations.safetensors"):
        if path.exists():
            data = path.read_bytes()
            header = parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")], file="", file_bytes=len(data))
            metadata[path.name] = dict(header.metadata)
            for one in header.tensors.values():
                specs.append(TensorSpec(one.name, one.dtype, one.shape))
                digests[one.name] = digest_of(data[one.start : one.start + one.num_bytes])
    files, headers = {"calibration.json": raw}, (specs, metadata)
    record = write_record("calibrate", {}, tensors=digests, files=files, headers=headers)
    (folder / "mopt.json").write_bytes(record)
    return folder


def edit_whole(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change calibration.json, and have the statistics follow: a calibration of another run."""
    said = json.loads((folder / "calibration.json").read_text())
    change(said)
    stats, path, made = load_file(folder / "stats.safetensors"), folder / "stats.safetensors", dict[str, Tensor]()
    for name, one in said["transformers"].items():
        prefix = f"{name}/" if len(said["transformers"]) > 1 else ""
        for module, kept in one["modules"].items():
            if kept["amax"] is not None:
                made |= {f"{prefix}{module}.{part}": stats[f"{module}.{part}"] for part in ("mean_square", "histogram")}
                made[f"{prefix}{module}.amax"] = torch.tensor(kept["amax"])
    save_file(made, path, {"format": "pt"})
    said["stats_xxh3_128"] = file_digest(path)

    def put(before: dict[str, Any]) -> None:
        before.clear()
        before.update(said)

    return edit_calibration(folder, put)


def damage(folder: Path, draw: random.Random) -> str:
    """Change some bytes of one file, cut it, or take it away; in words."""
    path = draw.choice(sorted(folder.iterdir()))
    raw = bytearray(path.read_bytes())
    match draw.choice(["flip", "flip", "flip", "cut", "grow", "remove"]):
        case "flip":
            place = draw.randrange(len(raw))
            raw[place] ^= 1 << draw.randrange(8)
            path.write_bytes(raw)
            return f"{path.name}: byte {place}"
        case "cut":
            size = draw.randrange(len(raw))
            path.write_bytes(raw[:size])
            return f"{path.name}: cut to {size}"
        case "grow":
            path.write_bytes(raw + b"\0")
            return f"{path.name}: grown"
        case _:
            path.unlink()
            return f"{path.name}: gone"
