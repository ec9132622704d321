"""The amax of a checkpoint: they must fit the export's scales, its modules, and be numbers."""

import re
from pathlib import Path

import pytest
import torch
from faults import entries
from fp8_support import (
    PACKED,
    REPLACED,
    convert,
    edited_checkpoint,
    fp8_refused,
    packed_modules,
    save_checkpoint,
    state_dict,
)
from support import load, same_bits

WEIGHT_AMAX, INPUT_AMAX = f"{PACKED}.weight_quantizer._amax", f"{PACKED}.input_quantizer._amax"


def test_an_old_export_without_its_checkpoint_is_refused_with_a_hint(old: Path, base: Path, room: Path) -> None:
    fp8_refused(old, base, room, code="export.nothing_quantized", names=(str(old),), hint="--checkpoint")


def test_a_checkpoint_that_agrees_changes_nothing(
    fp8: Path, good: Path, base: Path, built_fp8: Path, tmp_path: Path
) -> None:
    outcome = convert(fp8, base, tmp_path / "out", "--checkpoint", good)
    assert outcome.exit_code == 0, outcome.stderr
    left, right = load(built_fp8), load(tmp_path / "out")
    assert left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", [WEIGHT_AMAX, INPUT_AMAX])
@pytest.mark.parametrize("factor", [2.0, 0.5, 1.01])
def test_a_checkpoint_of_another_run_is_refused_with_both_values(
    factor: float, name: str, fp8: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    """Other builders replace the export's scales without a word: 0.001665 became 0.000833."""
    found = state_dict(good)[name]
    other = (found.float() * factor).to(found.dtype)
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {name: other})
    role = "weight_scale" if name == WEIGHT_AMAX else "input_scale"
    exported = float(load(fp8 / "transformer")[f"{PACKED}.{role}"])
    outcome = fp8_refused(fp8, base, room, "--checkpoint", path, code="export.amax_disagrees", names=(PACKED, role))
    shown = [float(number) for number in re.findall(r"\b\d+\.\d+(?:e-?\d+)?\b", outcome.message)]
    for value in (exported, float(other.float() / 448)):
        assert any(number == pytest.approx(value, rel=1e-5) for number in shown), outcome.message


@pytest.mark.parametrize(("factor", "agrees"), [(1 + 3e-7, True), (1 - 3e-7, True), (1 + 1e-4, False)])
def test_an_f32_amax_may_be_off_by_a_rounding_only(
    factor: float, agrees: bool, fp8: Path, good: Path, base: Path, tmp_path: Path
) -> None:
    exact = state_dict(good)[WEIGHT_AMAX].float() * factor
    assert float(exact) != float(state_dict(good)[WEIGHT_AMAX])
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {WEIGHT_AMAX: exact})
    outcome = convert(fp8, base, tmp_path / "out", "--checkpoint", path)
    assert outcome.error_code == (None if agrees else "export.amax_disagrees"), outcome.stderr


@pytest.mark.parametrize(
    ("name", "code"), [(WEIGHT_AMAX, "export.missing_weight_scale"), (INPUT_AMAX, "export.missing_input_scale")]
)
def test_a_module_without_amax_is_refused_and_named(
    name: str, code: str, old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    """Its neighbours have one, so it was meant to be quantized: left in BF16 it would be so without a word."""
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {}, without=(name,))
    fp8_refused(old, base, room, "--checkpoint", path, code=code, names=(PACKED,), hint=f"--keep-bf16 '{PACKED}'")
    outcome = convert(old, base, tmp_path / "out", "--checkpoint", path, "--keep-bf16", PACKED)
    assert outcome.exit_code == 0, outcome.stderr
    out = load(tmp_path / "out")
    assert same_bits(out[f"{PACKED}.weight"], load(base / "transformer")[f"{PACKED}.weight"])


def test_an_amax_missing_where_the_preset_keeps_bf16_is_excused(
    old: Path, good: Path, base: Path, tmp_path: Path
) -> None:
    without = (f"{REPLACED}.weight_quantizer._amax", f"{REPLACED}.input_quantizer._amax")
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {}, without=without)
    outcome = convert(old, base, tmp_path / "out", "--checkpoint", path)
    assert outcome.exit_code == 0, outcome.stderr
    assert REPLACED not in packed_modules(load(tmp_path / "out"))


@pytest.mark.parametrize(
    "value", [torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(-1.0)]
)
@pytest.mark.parametrize("name", [WEIGHT_AMAX, INPUT_AMAX])
def test_an_unusable_amax_is_refused(
    name: str, value: torch.Tensor, old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {name: value.to(torch.bfloat16)})
    names = (PACKED, "checkpoint")
    fp8_refused(old, base, room, "--checkpoint", path, code="export.unusable_scale", names=names)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(4),
        torch.ones(160, 1),
        torch.ones((), dtype=torch.int64),
        torch.ones((), dtype=torch.complex64),
        torch.empty((), device="meta"),
        1.5,
    ],
)
def test_an_amax_that_is_not_one_number_is_refused(
    value: torch.Tensor, old: Path, good: Path, base: Path, room: Path, tmp_path: Path
) -> None:
    """One per row is another algorithm; what has no memory to read has no value."""
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {WEIGHT_AMAX: value})
    fp8_refused(old, base, room, "--checkpoint", path, code="pickle.content", names=(str(path), WEIGHT_AMAX))


def test_weights_of_the_checkpoint_are_never_used(old: Path, good: Path, base: Path, tmp_path: Path) -> None:
    """Only amax tensors are: the weights come from the export, so a wrong one here changes nothing."""
    name = f"{PACKED}.weight"
    path = edited_checkpoint(good, tmp_path / "transformer.pt", {name: torch.zeros(2, 2)})
    outcome = convert(old, base, tmp_path / "out", "--checkpoint", path)
    assert outcome.exit_code == 0, outcome.stderr
    assert bool(load(tmp_path / "out")[name].float().any())


def test_a_checkpoint_of_another_model_is_refused(old: Path, base: Path, room: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "transformer.pt", {"down.0.weight_quantizer._amax": torch.tensor(1.0)})
    before = entries(room)
    outcome = convert(old, base, room / "out", "--checkpoint", path)
    assert outcome.exit_code == 3 and outcome.error_code is not None, outcome.stderr
    assert outcome.error_code in {"export.nothing_quantized", "export.missing_weight_scale", "pickle.content"}
    assert entries(room) == before
