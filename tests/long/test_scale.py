"""Full sizes: FLUX.1-dev by its headers, whose bytes are holes in sparse files, and all of 10,000 modules."""

import json
from pathlib import Path

import pytest
import torch
from faults import QUANTIZATION_CONFIG, SHARD
from figures import note
from limited import Ended, run_limited
from safetensors.torch import save_file

from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4

MODULES = 10_000
PEAK_MB = 4000
CLASS: dict[str, object] = {"_class_name": "AnyTransformer2DModel"}


def measured(what: str, *arguments: str | Path, codes: set[int]) -> Ended:
    """Run it, note what it took, and require one of these exit codes."""
    ended = run_limited(*arguments)
    print(what, arguments[0], ended.error_code, ended.figures)
    note(18, what=what, command=str(arguments[0]), cases=1, **ended.figures)
    assert ended.exit_code in codes, ended.stderr[-2000:] + ended.stdout[-2000:]
    assert 0 < ended.peak_mb < PEAK_MB
    return ended


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparse_flux1 import make

    folder = tmp_path_factory.mktemp("flux1")
    make(folder)
    return folder


def test_flux1_at_full_size(flux1: Path, tmp_path: Path) -> None:
    """What needs headers or scales alone reads no more; a build or verify of it all would need the real bytes."""
    inputs = ("--export", flux1 / "export", "--base", flux1 / "base", "--output", tmp_path / "out")
    measured("24 GB by headers", "build-nvfp4", "--preset", "flux1-dev", *inputs, "--dry-run", codes={0})
    measured("24 GB by headers", "inspect", flux1 / "base", codes={0})
    measured("7 GB export of zeros", "inspect", flux1 / "export", codes={0})
    assert not (tmp_path / "out").exists()


def test_10_000_modules(tmp_path: Path) -> None:
    """Written, proved and verified: 40,000 tensors in the end."""
    weights = torch.randn(MODULES, 32, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    global_scale = weights.float().abs().max() / (6 * 448)
    packed, scales = quantize_nvfp4(weights.reshape(-1, 32), global_scale)
    names = [f"blocks.{number}.lin" for number in range(MODULES)]
    roles = {"weight": packed.reshape(MODULES, 32, 16), "weight_scale": scales.reshape(MODULES, 32, 2)}
    export = {f"{name}.{role}": rows[number] for role, rows in roles.items() for number, name in enumerate(names)}
    export |= {f"{name}.weight_scale_2": global_scale for name in names}
    export |= {f"{name}.input_scale": torch.tensor(0.01) for name in names}
    lay(tmp_path / "export", export, CLASS | {"quantization_config": QUANTIZATION_CONFIG})
    lay(tmp_path / "base", {f"{name}.weight": weights[number] for number, name in enumerate(names)}, CLASS)
    inputs = ("--export", tmp_path / "export", "--base", tmp_path / "base", "--output", tmp_path / "out")
    what = f"{MODULES} modules"
    measured(what, "build-nvfp4", "--preset", "none", *inputs, codes={0})
    measured(what, "inspect", tmp_path / "out", codes={0})
    measured(what, "verify", tmp_path / "out", "--base", tmp_path / "base", codes={0})


def lay(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    """Write a checkpoint of one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SHARD)
