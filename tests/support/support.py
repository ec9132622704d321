"""What several tests need: running mopt, editing checkpoints, looking at trees."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from hints import not_runnable
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from modelopt_convert.cli import app

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """How a run of mopt ended; ``report`` is its JSON report, or None where none was asked for."""

    exit_code: int
    stdout: str
    stderr: str
    report: dict[str, Any] | None

    @property
    def error_code(self) -> str | None:
        """The stable code of the error, if the run failed."""
        return self.report["error"]["code"] if self.report and self.report["error"] else None

    @property
    def message(self) -> str:
        """Message and hint of the error."""
        assert self.report is not None
        return f"{self.report['error']['message']}\n{self.report['error']['hint']}"


def run_mopt(*arguments: str | Path, json_report: bool = True) -> Outcome:
    """Run mopt in this process, with --json unless told otherwise; whatever hint it gives names its own options."""
    words = [str(argument) for argument in arguments] + (["--json"] if json_report else [])
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    hints = [line.removeprefix("hint: ") for line in result.stderr.splitlines() if line.startswith("hint: ")]
    assert [one for hint in hints for one in not_runnable(words[0], hint)] == []
    report = None
    if json_report and result.stdout.startswith("{"):
        report = json.loads(result.stdout)
    return Outcome(result.exit_code, result.stdout, result.stderr, report)


def build(
    export: Path | None, base: Path, output: Path, *more: str | Path, preset: str | None = "flux1-dev"
) -> Outcome:
    """Run ``mopt build-nvfp4``; without an export the base itself is quantized."""
    chosen = [] if preset is None else ["--preset", preset]
    given = [] if export is None else ["--export", export]
    return run_mopt("build-nvfp4", *chosen, *given, "--base", base, "--output", output, *more)


def inspected(source: Path, *more: str | Path) -> dict[str, Any]:
    """The report of ``mopt inspect``."""
    outcome = run_mopt("inspect", source, *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["status"] == "ok" and outcome.report["error"] is None
    return outcome.report


def misreads(report: dict[str, Any]) -> list[str]:
    """What SGLang would read wrong, as the report of ``mopt inspect`` says it."""
    return [fault["message"] for fault in report["lint"] if fault["code"] == "engine.misread"]


def load(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder, read by safetensors itself."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = file.get_tensor(name)
    return found


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def packed_in(tensors: Tensors) -> list[str]:
    """The modules whose weight is packed in NVFP4, in the order of the tensors."""
    return [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.uint8]


def config_of(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    return json.loads((folder / "config.json").read_text())


def edit(
    source: Path,
    target: Path,
    change: Callable[[Tensors], object] | None = None,
    change_config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy of a transformer folder as one file, after ``change`` has had its way with the tensors or the config."""
    source = source / "transformer" if (source / "transformer").is_dir() else source
    target.mkdir(parents=True)
    tensors, config = load(source), config_of(source)
    if change is not None:
        change(tensors)
    if change_config is not None:
        change_config(config)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of JSON where it lies."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def copy(source: Path, target: Path) -> Path:
    """A copy of a transformer folder, shards and index as they are."""
    return Path(shutil.copytree(source / "transformer" if (source / "transformer").is_dir() else source, target))


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, hidden ones included; empty if there is none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content_of(folder: Path) -> str:
    """The digest of all bytes of a checkpoint's weight files, as docs/reports.md defines it, from whole files."""
    headers, tensors = hashlib.sha256(), dict[str, str]()
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = raw[8 : 8 + length], raw[8 + length :]
        headers.update(f"{path.name}\0{length}\0".encode() + header)
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = xxhash.xxh3_128_hexdigest(data[begin:end])
    return xxhash.xxh3_128_hexdigest(json.dumps([headers.hexdigest(), tensors], sort_keys=True).encode())
