"""Bases in F32, F16 and mixtures: what is built of them is proven, whole and by sampled rows, whatever lies beside."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fp8_base_support import CPU
from support import Tensors, edit, run_mopt
from verify_support import verify

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def largest_alone(_: str, one: torch.Tensor) -> torch.Tensor:
    """Values of 16 bits but for the largest, which a cast rounds down: all codes are the same under both."""
    wide = one.float()
    at = wide.abs().argmax()
    wide.view(-1)[at] *= 1 + 2**-12
    return wide


def trained(name: str, one: torch.Tensor) -> torch.Tensor:
    """Values that only F32 holds."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return one.float() * (1 + 1e-3 * torch.randn(one.shape, generator=torch.Generator().manual_seed(seed)))


def mixed(name: str, one: torch.Tensor) -> torch.Tensor:
    """Each tensor in one of three dtypes."""
    return trained(name, one).to(DTYPES[sum(map(ord, name)) % 3])


KINDS: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "f32": trained,
    "f32, the largest alone": largest_alone,
    "f16": lambda name, one: trained(name, one).half(),
    "all three": mixed,
}


@pytest.mark.parametrize(
    ("kind", "command"),
    [*((kind, "build-nvfp4") for kind in KINDS), ("f32", "convert-fp8"), ("all three", "convert-fp8")],
)
def test_what_is_built_of_a_base_is_proven(families: Path, tmp_path: Path, kind: str, command: str) -> None:
    """Also where most that is not quantized stays in F32, so that F32 seems the likeliest cast."""

    def change(tensors: Tensors) -> None:
        tensors |= {name: KINDS[kind](name, one) for name, one in tensors.items()}

    base, out, mine = (
        edit(families / "z_image" / "base", tmp_path / "base", change),
        tmp_path / "out",
        tmp_path / "z.toml",
    )
    mine.write_text('extends = "z-image"\nname = "wide"\nkeep_fp32 = ["**"]\n')
    words = ("--preset", mine, "--base", base, "--output", out, "--allow-known-broken")
    outcome = run_mopt(command, *words)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    closed = outcome.report["verify"]["modules"].values()
    assert {one["verdict"] for one in closed} == {"reproduced"}
    whole = verify(out, *CPU, "--base", base)
    assert whole.exit_code == 0 and whole.report is not None, whole.stderr
    assert whole.report["verify"]["proof"] == "proven"
    assert {one["verdict"] for one in whole.report["verify"]["modules"].values()} == {"reproduced"}
