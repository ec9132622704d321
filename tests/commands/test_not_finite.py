"""NaN and infinity that base and export share: the same bits, so nothing is mismatched, and told wherever they pass.

In weights that are quantized there is no such thing: they are refused.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import REPLACED, small_pair, swapped
from support import Outcome, Tensors, edit, load, run_mopt
from verify_support import found, verify

from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows

SHAPES = {"blocks.0.ff": (300, 128), "blocks.1.ff": (70, 320)}
KEPT = "blocks.1.ff"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = (float("nan"), float("inf"), float("-inf"))
# Unquantized tensors; the last is longer than one piece that is read at a time, in each dtype.
PLAIN = {"bias": (7,), "norm.weight": (3, 5), "table.weight": (3, 5, 2), "embed.weight": (900, 700)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small export and its base. Never write there."""
    return small_pair(tmp_path_factory.mktemp("odd"), SHAPES)


def planted(pair: tuple[Path, Path], room: Path, seed: int, count: int = 3) -> tuple[Path, Path, str]:
    """Both with the same unquantized tensors, of which one is not finite somewhere; and what is to be told of it."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 3]
    more = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in PLAIN.items()}
    name = list(PLAIN)[seed % 4]
    flat = more[name].view(-1)
    places = sorted(source.sample(range(flat.numel()), min(count, flat.numel())))
    for place in places:
        flat[place] = source.choice(ODD)
    first = [int(one) for one in torch.unravel_index(torch.tensor(places[0]), more[name].shape)]
    both = [edit(one, room / one.name, lambda tensors: tensors.update(more)) for one in pair]
    return (
        both[0],
        both[1],
        f"{len(places)} values of 1 tensors are NaN or infinity: {name} ({len(places)}, first at {first})",
    )


def warned(outcome: Outcome, code: str = "tensor.not_finite") -> list[str]:
    assert outcome.report is not None, outcome.stderr
    return [one["message"] for one in outcome.report["warnings"] if one["code"] == code]


def built(export: Path, base: Path | None, out: Path, *more: str) -> Outcome:
    given = ("--base", base) if base is not None else ()
    return run_mopt("build-nvfp4", "--preset", "none", "--export", export, *given, "--output", out, *more)


def container(outcome: Outcome) -> dict[str, Any]:
    (level,) = [one for one in found(outcome)["levels"] if one["level"] == "L0"]
    return level


@pytest.mark.parametrize("seed", range(8))
def test_a_build_and_verify_tell_it_and_the_verdict_stands(seed: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    export, base, words = planted(pair, tmp_path, seed, 1 + seed % 4)
    outcome = built(export, base, tmp_path / "out", "--workers", "2")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    (told,) = warned(outcome)
    assert told.startswith(words) and f"warning: {words}" in outcome.stderr
    assert outcome.report["proof"]["words"] == "proven"
    bare = Path(shutil.copytree(tmp_path / "out", tmp_path / "bare"))
    (bare / "mopt.json").unlink()
    cases = ((tmp_path / "out", ("--base", base), "proven"), (tmp_path / "out", (), "unchanged"))
    for checkpoint, more, proof in (*cases, (bare, ("--base", base), "proven")):
        checked = verify(checkpoint, *more, "--device", "cpu")
        assert (checked.exit_code, found(checked)["proof"]) == (0, proof), checked.stderr
        level = container(checked)
        assert level["status"] == "warn" and [one for one in level["warnings"] if one.startswith(words)]
        text = run_mopt("verify", checkpoint, *more, "--device", "cpu", json_report=False).stdout
        assert f"warn: L0: {words}" in text and text.startswith(f"{proof}\n")


def test_what_is_finite_is_not_told_and_a_difference_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The largest values there are, and subnormals; and NaN in one of both."""
    export, base = pair
    edges = {
        f"edge.{dtype}": torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=dtype)
        for dtype in DTYPES
    } | {"counts": torch.tensor([-1, 2**15 + 1, 2**31 - 1], dtype=torch.int32)}
    export, base = (edit(one, tmp_path / f"edge-{one.name}", lambda all_: all_.update(edges)) for one in (export, base))
    outcome = built(export, base, tmp_path / "out")
    # The largest of F32 is infinity in BF16, in which the base's tensors are written.
    (told,) = warned(outcome)
    assert outcome.exit_code == 0 and told.startswith(
        "2 values of 1 tensors are NaN or infinity: edge.torch.float32 (2,"
    )
    assert not [one for one in container(verify(export, "--base", base))["warnings"] if "NaN" in one]
    for side in (export, base):
        other = edit(side, tmp_path / f"odd-{side.name}", lambda all_: all_["norm.weight"].view(-1)[4:5].fill_(ODD[0]))
        inputs = (other, base) if side == export else (export, other)
        refused = built(*inputs, tmp_path / "never")
        assert (refused.exit_code, refused.error_code) == (3, "export.other_base") and "nan" in refused.message


@pytest.mark.parametrize("seed", range(4))
def test_rewrites_tell_it(seed: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    export, base, words = planted(pair, tmp_path, seed)
    source = edit(export, tmp_path / "source", swapped)
    for number, more in enumerate(((), ("--base", base))):
        outcome = run_mopt("swap-nibbles", source, tmp_path / f"out{number}", *more)
        assert outcome.exit_code == 0, outcome.stderr
        assert warned(outcome)[0].startswith(words)
        assert load(tmp_path / f"out{number}").keys() == load(export).keys()


@pytest.mark.parametrize("with_base", [True, False])
def test_an_fp8_conversion_tells_it_with_and_without_a_base(with_base: bool, exports: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["norm_out.linear.weight"][11, 4] = float("inf")

    sides = [edit(exports / name, tmp_path / name, spoil) for name in ("fp8", "base")]
    given = ("--base", sides[1]) if with_base else ()
    words = ("convert-fp8", "--preset", "flux1-dev", "--export", sides[0], "--output", tmp_path / "out")
    outcome = run_mopt(*words, *given)
    assert outcome.exit_code == 0, outcome.stderr
    (told,) = warned(outcome)
    assert told.startswith("1 values of 1 tensors are NaN or infinity: norm_out.linear.weight (1, first at [11, 4])")


def test_what_becomes_infinity_by_its_scale_is_told(exports: Path, tmp_path: Path) -> None:
    """Of a module that is kept in BF16 without a base: its codes times a scale that is far too large."""
    export = edit(exports / "fp8", tmp_path / "fp8", lambda all_: all_[f"{REPLACED}.weight_scale"].fill_(3e36))
    outcome = run_mopt("convert-fp8", "--preset", "flux1-dev", "--export", export, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    count = int((~load(tmp_path / "out")[f"{REPLACED}.weight"].isfinite()).sum())
    assert count > 0 and f": {REPLACED}.weight ({count}, first at " in warned(outcome)[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_that_is_kept_in_bf16_is_looked_at_whole(seed: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows of such a module are compared by sample; all of the base's are written."""
    rows, columns = SHAPES[KEPT]
    source = random.Random(seed)
    row = source.choice([row for row in range(rows) if row not in sample_rows(rows, SAMPLED_ROWS)])
    column = source.randrange(columns)
    base = edit(pair[1], tmp_path / "base", lambda all_: all_[f"{KEPT}.weight"][row, column].fill_(float("nan")))
    outcome = built(pair[0], base, tmp_path / "out", "--keep-bf16", KEPT)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"{KEPT}.weight (1, first at [{row}, {column}])" in warned(outcome)[0]
    # The same weight, quantized, would be no number anywhere.
    refused = built(pair[0], base, tmp_path / "never")
    assert (refused.exit_code, refused.error_code) == (3, "base.not_finite") and f"{KEPT}.weight" in refused.message


@pytest.mark.parametrize("seed", range(6))
def test_a_quantized_weight_of_no_number_is_refused_wherever_it_is(
    seed: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """By builds, from an export and without, by rewrites and by verify; at any place, sampled or not."""
    source = random.Random(seed)
    module = source.choice(list(SHAPES))
    rows, columns = SHAPES[module]
    place = source.randrange(rows), source.randrange(columns)
    odd = source.choice(ODD)
    base = edit(
        pair[1],
        tmp_path / "base",
        lambda all_: all_[f"{module}.weight"].index_put_(
            tuple(map(torch.tensor, place)), torch.tensor(odd, dtype=torch.bfloat16)
        ),
    )
    refused = built(pair[0], base, tmp_path / "out")
    assert (refused.exit_code, refused.error_code) == (3, "base.not_finite") and module in refused.message
    checked = verify(pair[0], "--base", base, "--device", "cpu")
    assert (checked.exit_code, found(checked)["proof"]) == (1, "mismatch")
    assert any(module in one and "NaN or infinity" in one for one in found(checked)["levels"][3]["failures"])
    rewritten = run_mopt("swap-nibbles", edit(pair[0], tmp_path / "source", swapped), tmp_path / "out", "--base", base)
    assert rewritten.exit_code != 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(4))
def test_an_fp8_base_of_no_number_and_fp8_codes_of_none_are_refused(seed: int, exports: Path, tmp_path: Path) -> None:
    source = random.Random(seed)
    export, base = exports / "fp8" / "transformer", exports / "base" / "transformer"
    module = "single_transformer_blocks.0.proj_out"
    rows, columns = load(base)[f"{module}.weight"].shape
    row, column = source.randrange(rows), source.randrange(columns)
    words = ("convert-fp8", "--preset", "flux1-dev", "--output", tmp_path / "out")
    other = edit(base, tmp_path / "base", lambda all_: all_[f"{module}.weight"][row, column].fill_(source.choice(ODD)))
    outcome = run_mopt(*words, "--export", export, "--base", other)
    assert (outcome.exit_code, outcome.error_code) == (3, "base.not_finite") and module in outcome.message

    def spoil(tensors: Tensors) -> None:
        tensors[f"{module}.weight"].view(torch.uint8)[row, column] = source.choice((0x7F, 0xFF))

    broken = edit(export, tmp_path / "export", spoil)
    for more in (("--base", base), ()):
        outcome = run_mopt(*words, "--export", broken, *more)
        assert (outcome.exit_code, outcome.error_code) == (3, "export.not_finite") and module in outcome.message
    checked = verify(broken, "--base", base, "--device", "cpu")
    assert checked.exit_code == 1 and any(module in one for one in container(checked)["failures"])
