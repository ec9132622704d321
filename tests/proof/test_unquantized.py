"""Which side's values are rounded, and what is not the base's at all."""

from collections.abc import Sequence
from pathlib import Path
from threading import Event

import pytest
import torch
from checkpoint_folders import SINGLE, write

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.proof.unquantized import rounded_side

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Below 6e-5 the values of F16 are subnormal: it then has fewer bits than BF16, and none below 3e-8.
VALUES = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 1, 4096)


def cast(path: Sequence[torch.dtype]) -> torch.Tensor:
    """The values after one dtype and then the next."""
    values = VALUES
    for dtype in path:
        values = values.to(dtype)
    return values


def side(export: torch.Tensor, base: torch.Tensor, folder: Path) -> str | None:
    """What is found of a tensor in two checkpoints."""
    paths = [write(folder / name, {SINGLE: {"w": one}}) for name, one in (("export", export), ("base", base))]
    with CheckpointReader(paths[0]) as mine, CheckpointReader(paths[1]) as theirs:
        return rounded_side(mine, theirs, "w", Event())


@pytest.mark.parametrize(
    ("more", "rounded"),
    [
        ((), ()),
        *(((F32,), (F32, *path)) for path in ((BF16,), (F16,), (BF16, F32), (F16, F32), (BF16, F16), (F16, BF16))),
        ((BF16,), (BF16, F16)),
        ((F16,), (F16, BF16)),
    ],
)
def test_either_side_may_be_a_cast_of_the_other(
    more: tuple[torch.dtype, ...], rounded: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    fine, coarse = cast(more), cast(rounded)
    assert side(coarse, fine, tmp_path / "export") == "export"
    assert side(fine, coarse, tmp_path / "base") == ("base" if rounded else "export")
    for number in (0, -1):
        for name, one in (("fine", fine), ("coarse", coarse)):
            other = one.clone()
            other[number] = 3.0
            pair = (other, coarse) if name == "fine" else (other, fine)
            assert side(*pair, tmp_path / f"{name}{number}") is None
            assert side(*reversed(pair), tmp_path / f"{name}{number} turned") is None


def test_what_is_exact_in_both_is_no_coarser_base(tmp_path: Path) -> None:
    small = torch.arange(-128.0, 128.0)
    for number, (export, base) in enumerate(((F32, BF16), (BF16, F16), (F16, F32))):
        assert side(small.to(export), small.to(base), tmp_path / f"{number}") == "export"


def test_two_roundings_of_one_original_are_no_cast_of_each_other(tmp_path: Path) -> None:
    assert side(VALUES.bfloat16(), VALUES.half(), tmp_path) is None
