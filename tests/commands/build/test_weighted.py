"""``build-nvfp4 --weights sweep-weighted``: a calibration weighs errors, and proves the scales that were so chosen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated import TINY, edit_calibration
from producers import Packed, block_errors, codes_under, max_calibration
from safetensors.numpy import load_file, save_file
from support import Outcome, Tensors, copy, edit, load, packed_in, run_mopt, same_bits, tree
from verify_support import verify

from modelopt_convert.checkpoint.calibration import file_digest, read_calibration

RULE = "a sweep weighted by a calibration"
PACKED = "transformer_blocks.0.attn.to_q"
CPU = ("--device", "cpu")
HINT = "--calibration CALIB proves them where the build was given one"


def build(calib: Path | None, output: Path, *more: str | Path, weights: str = "sweep-weighted") -> Outcome:
    words = ("--preset", "flux1-dev", "--base", TINY, "--weights", weights, "--output", output)
    return run_mopt("build-nvfp4", *words, *(("--calibration", calib) if calib is not None else ()), *more)


@pytest.fixture(scope="module")
def weighted(calib: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("weighted") / "out"
    outcome = build(calib, out)
    assert outcome.exit_code == 0, outcome.stderr
    return out, outcome


def packed(tensors: Tensors, module: str) -> Packed:
    return Packed(*(tensors[f"{module}.{role}"] for role in ("weight", "weight_scale", "weight_scale_2")))


def searched(base: torch.Tensor, scale_2: torch.Tensor, counts: np.ndarray) -> Packed:
    """The best of ten scales by weighted error: all candidates of all blocks at once, sums in numpy's own order.

    Of candidates within rounding of each other the first of the rule's order is taken.
    """
    common = max_calibration(base, scale_2)
    middle = common.scale.view(torch.uint8).numpy().astype(int)
    values = base.double().numpy().reshape(*middle.shape, 16)
    bytes_of = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    factors = (bytes_of.float() * scale_2).numpy().astype(np.float64)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    errors = []
    for step in (0, 7, 6, 5, 4, 3, 2, 1, -1, -2):
        factor = factors[np.clip(middle + step, 1, 126)][..., None]
        nearest = grid[np.abs(np.abs(values / factor)[..., None] - grid).argmin(-1)] * factor
        errors.append(((nearest - np.abs(values)) ** 2 * counts.astype(np.float64).reshape(-1, 16)).sum(-1))
    found = np.stack(errors)
    steps = np.array((0, 7, 6, 5, 4, 3, 2, 1, -1, -2))
    best = found.min(0)
    chosen = steps[(found <= best * (1 + 1e-12)).argmax(0)]
    raw = torch.from_numpy(np.clip(middle + chosen, 1, 126).astype(np.uint8))
    return codes_under(base, raw.view(torch.float8_e4m3fn), scale_2)


def test_every_scale_is_that_of_a_search_in_numpy(calib: Path, weighted: tuple[Path, Outcome]) -> None:
    out, base, stats = load(weighted[0]), load(TINY / "transformer"), load_file(calib / "stats.safetensors")
    modules, differing = packed_in(out), 0
    assert modules
    for module in modules:
        weight, one, counts = base[f"{module}.weight"].bfloat16(), packed(out, module), stats[f"{module}.mean_square"]
        assert all(map(same_bits, one, searched(weight, one.global_scale, counts))), module
        common, importance = max_calibration(weight, one.global_scale), torch.from_numpy(counts)
        after, before = (block_errors(weight, each, importance) for each in (one, common))
        assert bool((after <= before * (1 + 1e-12)).all())  # the law: no block's weighted error rises
        differing += int((one.scale.view(torch.uint8) != common.scale.view(torch.uint8)).sum())
    assert differing > 1000


def test_with_its_calibration_it_is_reproduced(weighted: tuple[Path, Outcome], calib: Path, tmp_path: Path) -> None:
    """At the end of the build, by its record, and without a record."""
    out, outcome = weighted
    assert outcome.report is not None and outcome.report["weights"] == "sweep-weighted"
    bare = edit(out, tmp_path / "bare", None)
    (bare / "mopt.json").unlink(missing_ok=True)
    for report in (
        outcome.report,
        *(verify(one, *CPU, "--base", TINY, "--calibration", calib).report for one in (out, bare)),
    ):
        assert report is not None and report["exit_code"] == 0
        found = report["verify"]["modules"].values()
        assert {(one["verdict"], one["rule"]) for one in found} == {("reproduced", RULE)}
    record = json.loads((out / "mopt.json").read_text())
    assert record["weights"] == "sweep-weighted" and record["calibration"]["digest"] == read_calibration(calib).digest
    assert "(`--weights sweep-weighted`)" in (out / "README.md").read_text()
    assert f"weights by {RULE}" in verify(out, *CPU).report["verify"]["statement"]


def test_without_it_weights_are_near_and_a_line_says_what_proves_them(
    weighted: tuple[Path, Outcome], tmp_path: Path
) -> None:
    found = verify(weighted[0], *CPU, "--base", TINY)
    assert found.exit_code == 1 and found.report is not None and HINT in found.report["error"]["hint"]
    assert {one["verdict"] for one in found.report["verify"]["modules"].values()} == {"near"}
    assert verify(weighted[0], *CPU, "--base", TINY, "--accept-near").exit_code == 0


@pytest.mark.parametrize("role", ["weight", "weight_scale"])
def test_a_planted_fault_is_seen(weighted: tuple[Path, Outcome], calib: Path, tmp_path: Path, role: str) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[f"{PACKED}.{role}"].view(torch.uint8)[3, 3] += 1

    bad = edit(weighted[0], tmp_path / "bad", plant)
    (bad / "mopt.json").unlink(missing_ok=True)
    found = verify(bad, *CPU, "--base", TINY, "--calibration", calib)
    assert found.exit_code == 1 and found.report is not None
    modules = found.report["verify"]["modules"]
    assert modules[PACKED]["verdict"] in ("near", "mismatch")
    assert {one["verdict"] for name, one in modules.items() if name != PACKED} == {"reproduced"}


def test_workers_and_pieces_change_no_byte(
    weighted: tuple[Path, Outcome], calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_convert.write.pieces._COMPUTED_BYTES", 5000)
    again = build(calib, tmp_path / "again", "--workers", "3", "--verify", "off")
    assert again.exit_code == 0 and tree(tmp_path / "again") == tree(weighted[0])


def test_another_calibration_is_refused_by_name(weighted: tuple[Path, Outcome], calib: Path, tmp_path: Path) -> None:
    other = edit_calibration(copy(calib, tmp_path / "other"), lambda said: said["prompts"].update(sha256="0" * 32))
    found = verify(weighted[0], *CPU, "--base", TINY, "--calibration", other)
    assert found.exit_code == 3 and found.error_code == "calibration.other"
    assert str(other) in found.message and read_calibration(calib).digest[:12] in found.message
    bare = edit(weighted[0], tmp_path / "bare", None)
    (bare / "mopt.json").unlink(missing_ok=True)
    strange = edit_calibration(
        copy(calib, tmp_path / "strange"),
        lambda said: said["transformers"]["transformer"]["base"].update(headers_sha256="0" * 64),
    )
    found = verify(bare, *CPU, "--base", TINY, "--calibration", strange)
    assert found.exit_code == 3 and found.error_code == "calibration.other_base"


def test_mean_squares_that_are_none_are_refused(calib: Path, tmp_path: Path) -> None:
    """Of a whole CALIB: digests are right, and a module's figures are not."""
    bad = copy(calib, tmp_path / "bad")
    stats = load_file(bad / "stats.safetensors")
    stats[f"{PACKED}.mean_square"] = -stats[f"{PACKED}.mean_square"]
    save_file(stats, bad / "stats.safetensors")
    edit_calibration(bad, lambda said: said.update(stats_xxh3_128=file_digest(bad / "stats.safetensors")))
    found = build(bad, tmp_path / "out")
    assert found.exit_code == 3 and found.error_code == "calibration.damaged" and repr(PACKED) in found.message


def test_what_cannot_be_meant_is_a_usage_error(calib: Path, tmp_path: Path) -> None:
    found = build(None, tmp_path / "out")
    assert found.exit_code == 2 and "sweep-weighted needs --calibration CALIB" in found.stdout + found.stderr
    found = run_mopt("convert-fp8", "--base", TINY, "--weights", "sweep-weighted", "--output", tmp_path / "out")
    assert found.exit_code == 2
    found = verify(TINY, "--calibration", calib)
    assert found.exit_code == 2 and "is for a comparison with --base" in found.stdout + found.stderr
    assert not (tmp_path / "out").exists()


def test_for_comfyui_too(weighted: tuple[Path, Outcome], calib: Path, tmp_path: Path) -> None:
    outcome = build(calib, tmp_path / "comfy", "--to", "comfyui", "--inexact", "bf16")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["weights"] == "sweep-weighted"
