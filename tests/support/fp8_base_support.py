"""Builds of FP8 from a base alone."""

from pathlib import Path
from typing import Any

from support import Outcome, config_of, run_mopt

CPU = ("--device", "cpu")
# What SGLang does not load right without input scales, either.
BROKEN = {"wan_i2v_image": ["--allow-known-broken"]}
PACKED = "single_transformer_blocks.0.proj_out"
WEIGHT = f"{PACKED}.weight"
BF16_RULE = "quotient in BF16"


def build(base: Path, output: Path, *more: str | Path, preset: str | None = "flux1-dev") -> Outcome:
    chosen = [] if preset is None else ["--preset", preset]
    return run_mopt("convert-fp8", *chosen, "--base", base, "--output", output, *more)


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = config_of(folder)["quantization_config"]
    return found
