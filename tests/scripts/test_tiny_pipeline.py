"""The pipeline that scripts/make/make_tiny_pipeline.py trained draws what a prompt says, by diffusers' own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from root import ROOT
from support import run_mopt

FOLDER = ROOT / "tests" / "data" / "tiny_flux1"
COLOURS = {"red": (255, 51, 38), "green": (51, 230, 76), "blue": (64, 115, 255), "yellow": (255, 217, 26)}
DIGITS = ("zero", "three", "six", "seven")
PROMPTS = {(colour, digit): f"a {colour} {digit}" for digit in DIGITS for colour in COLOURS}


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], torch.Tensor]:
    """An image [32, 32, 3] in 0..255 for each prompt, all from the same noise."""
    from diffusers import FluxPipeline

    pipeline: Any = FluxPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [*PROMPTS.values()],
        height=32,
        width=32,
        num_inference_steps=6,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=[torch.Generator().manual_seed(3) for _ in PROMPTS],
        output_type="np",
    ).images
    return {which: torch.tensor(image) * 255 for which, image in zip(PROMPTS, images, strict=True)}


def test_it_draws_in_the_colour_of_the_prompt(drawn: dict[tuple[str, str], torch.Tensor]) -> None:
    for (colour, _), image in drawn.items():
        bright = image[image.amax(dim=-1) > 128]
        assert len(bright) > 20
        mean = bright.mean(dim=0)
        near = min(COLOURS, key=lambda one: float((mean - torch.tensor(COLOURS[one])).norm()))
        assert near == colour


def test_it_draws_the_digit_of_the_prompt(drawn: dict[tuple[str, str], torch.Tensor]) -> None:
    """From the same noise two images of one digit are more alike than those of two digits."""
    shapes = {which: image.amax(dim=-1).flatten() for which, image in drawn.items()}
    alike = torch.corrcoef(torch.stack([*shapes.values()]))
    digits = [digit for _, digit in shapes]
    same = [[one == other for other in digits] for one in digits]
    mask = torch.tensor(same) & ~torch.eye(len(digits), dtype=torch.bool)
    assert float(alike[mask].mean()) > float(alike[~torch.tensor(same)].mean()) + 0.2


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_its_transformer_is_a_flux1_that_builds_and_is_proven(command: str, tmp_path: Path) -> None:
    built = run_mopt(command, "--preset", "flux1-dev", "--base", FOLDER, "--output", tmp_path / "out")
    assert built.exit_code == 0, built.stderr
    proven = run_mopt("verify", tmp_path / "out", "--base", FOLDER, "--device", "cpu")
    assert proven.exit_code == 0 and proven.report is not None, proven.stderr
    assert proven.report["verify"]["proof"] == "proven"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 4 << 20
