"""What no option and no second transformer takes from the proof of a build."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from faults import refused, small_pair
from support import Outcome, Tensors, build, edit, run_mopt

from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows

SHAPES = {"blocks.0.ff": (300, 128), "blocks.1.ff": (70, 320)}
NAMES = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small export and its base. Never write there."""
    return small_pair(tmp_path_factory.mktemp("whole"), SHAPES)


def built(export: Path, base: Path, out: Path, *more: str) -> Outcome:
    return build(export, base, out, *more, preset="none")


@pytest.mark.parametrize("seed", range(3))
def test_without_the_closing_step_all_is_compared_all_the_same(
    seed: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """One bit in a row that no look at a few rows sees."""
    source = random.Random(seed)
    module = source.choice(list(SHAPES))
    rows, columns = SHAPES[module]
    row = source.choice([row for row in range(rows) if row not in sample_rows(rows, SAMPLED_ROWS)])
    column, bit = source.randrange(columns // 2), source.choice((1, 2, 4, 16, 32, 64))

    def flip(tensors: Tensors) -> None:
        tensors[f"{module}.weight"][row, column] ^= bit

    export = edit(pair[0], tmp_path / "export", flip)
    for more in ("off", "cpu"):
        words = (f"{module} (row {row}, ",)
        refused(
            export, pair[1], tmp_path, "--verify", more, code="check.proof", names=words, exit_code=1, preset="none"
        )
    outcome = built(export, pair[1], tmp_path / "out", "--verify", "off", "--proof", "sampled")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["proof"]["words"] == "not proven: sampled"


@pytest.mark.parametrize("which", NAMES)
def test_of_two_transformers_the_weaker_proof_is_that_of_the_build(
    which: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def trained(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = tensors["blocks.0.ff.weight"].float()
        noise = torch.randn(weight.shape, generator=generator) * weight.std() * 0.03
        tensors["blocks.0.ff.weight"] = (weight + noise).bfloat16()

    for name in NAMES:
        shutil.copytree(pair[0], tmp_path / "export" / name)
        edit(pair[1], tmp_path / "base" / name, trained if name == which else None)
    export, base, out = (tmp_path / name for name in ("export", "base", "out"))
    outcome = built(export, base, out)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.proof") and not out.exists(), outcome.stderr
    outcome = built(export, base, out, "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    proof = outcome.report["proof"]
    assert (proof["status"], proof["words"]) == ("not proven", "not proven: near")
    assert {name for name, one in proof["modules"].items() if one["verdict"] == "near"} == {f"{which}/blocks.0.ff"}
    words = {name: json.loads((out / name / "mopt.json").read_text())["proof"]["words"] for name in NAMES}
    assert words == dict.fromkeys(NAMES, "proven") | {which: "not proven: near"}
    assert run_mopt("verify", out, "--base", base, "--device", "cpu").exit_code == 1
