"""Padding of an NVFP4 module: all of it is looked at and counted, and whatever it holds is refused."""

import random
from pathlib import Path

import pytest
import torch
from faults import swizzle
from judge_support import judged_as_stored
from producers import Packed, max_calibration
from torch.nn.functional import pad
from weights import weight

from modelopt_convert.proof import padding
from modelopt_convert.run.errors import InputError

SHAPES = [(40, 96), (130, 48), (1, 16), (128, 64), (300, 160)]


def padded(one: Packed, *, is_swizzled: bool) -> Packed:
    """Rows to 16, columns to 16 bytes, as ModelOpt's ``row_col``; then in the 128x4 order, if wanted."""
    packed, scale = (
        pad(part, (0, -part.shape[1] % 16, 0, -part.shape[0] % 16))
        for part in (one.packed, one.scale.view(torch.uint8))
    )
    scale = swizzle(scale) if is_swizzled else scale
    return Packed(packed, scale.view(torch.float8_e4m3fn), one.global_scale)


@pytest.mark.parametrize("is_swizzled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_is_counted(shape: tuple[int, int], is_swizzled: bool, tmp_path: Path) -> None:
    base = weight("gaussian", *shape, 0)
    one = max_calibration(base)
    stored = padded(one, is_swizzled=is_swizzled)
    found = judged_as_stored(tmp_path / "0", base, stored)
    assert found.verdict == "reproduced"
    assert found.counts.padding == sum(
        mine.numel() - theirs.numel() for mine, theirs in zip(stored[:2], one[:2], strict=True)
    )
    assert found.counts.codes == base.numel() and found.counts.scales == base.numel() // 16
    # Rows that choose what is tried say nothing of it.
    assert judged_as_stored(tmp_path / "1", base, stored, rows=[0]).counts.padding == 0


@pytest.mark.parametrize("seed", range(24))
def test_no_place_of_the_padding_may_hold_anything(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(seed)
    monkeypatch.setattr(padding, "_PIECE_BYTES", source.choice([1, 100, 1 << 20]))
    rows, columns = source.choice([(40, 96), (130, 48), (300, 160)])
    base = weight("gaussian", rows, columns, seed)
    stored = padded(max_calibration(base), is_swizzled=False)
    part, kept = source.choice([(stored.packed, columns // 2), (stored.scale.view(torch.uint8), columns // 16)])
    outside = torch.ones(part.shape, dtype=torch.bool)
    outside[:rows, :kept] = False
    place = source.choice(outside.nonzero().tolist())
    part[*place] = source.choice([1, 0x10, 0x80])
    with pytest.raises(InputError) as caught:
        judged_as_stored(tmp_path / "0", base, stored)
    assert caught.value.code == "export.padding", place
