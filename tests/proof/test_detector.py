"""Layout detection on adversarial tensors, and hints without a base."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.codes import pack_e2m1, quantize_nvfp4, shared_global_scale, swap_nibbles
from modelopt_convert.formats.nvfp4.scales import scale_readings, swizzle_128x4
from modelopt_convert.formats.nvfp4.stored import read_scales
from modelopt_convert.formats.rows import sample_rows
from modelopt_convert.inspection.component import common_answer
from modelopt_convert.proof.detector import Detection, detect_with_base, telling_rows
from modelopt_convert.proof.scale_hint import hint_scale_order


def detect(base: Tensor, packed: Tensor, stored: Tensor, global_scale: Tensor) -> Detection:
    readings = scale_readings(stored, base.shape[0], base.shape[1] // 16)
    rows = sorted({*sample_rows(len(base), 16), *telling_rows(readings, 4)})
    index = torch.tensor(rows)
    return detect_with_base([base[index]], packed[index], readings, rows, global_scale, max_error=0.15)


def raw_readings(stored: Tensor, rows: int, columns: int) -> dict[ScaleOrder, NDArray[np.uint8]]:
    return read_scales(stored.view(torch.uint8).numpy(), stored.shape, rows, columns)


def gauss(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def heavy(rows: int, columns: int) -> Tensor:
    return (gauss(rows, columns).float() ** 3).to(torch.bfloat16)


def equal_scales(rows: int, columns: int) -> Tensor:
    """Every block has the same amax: both orders of the scales are the same bytes."""
    weight = gauss(rows, columns).clamp(-2, 2)
    weight.view(rows, -1, 16)[:, :, 0] = 3.0
    return weight


def tile_constant(rows: int, columns: int) -> Tensor:
    """Scales constant within each tile of the 128x4 order."""
    weight = equal_scales(rows, columns).float()
    tiles = torch.rand(-(-rows // 128), -(-columns // 64), generator=torch.Generator().manual_seed(4)) + 0.5
    factor = tiles.repeat_interleave(128, 0)[:rows].repeat_interleave(64, 1)[:, :columns]
    return (weight * factor).to(torch.bfloat16)


KINDS = {
    "gauss": gauss,
    "heavy": heavy,
    "tiny": lambda rows, columns: gauss(rows, columns) * 1e-6,
    "equal scales": equal_scales,
    "tile constant": tile_constant,
    "constant": lambda rows, columns: torch.full((rows, columns), 0.5, dtype=torch.bfloat16),
    "all zero": lambda rows, columns: torch.zeros(rows, columns, dtype=torch.bfloat16),
    "constant rows": lambda rows, columns: gauss(rows, 1).expand(rows, columns).contiguous(),
    "symmetric": lambda rows, columns: gauss(rows, columns // 2).repeat_interleave(2, dim=1),
    "sparse": lambda rows, columns: gauss(rows, columns) * (gauss(rows, columns, 5) > 2),
}


@pytest.mark.parametrize("shape", [(16, 16), (100, 48), (128, 64), (256, 128), (384, 192)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_tensors_are_never_misjudged(kind: str, shape: tuple[int, int]) -> None:
    base = KINDS[kind](*shape)
    global_scale = shared_global_scale([base]).clamp(min=1e-30)  # an all-zero weight has none
    packed, scale = quantize_nvfp4(base, global_scale)
    for nibbles in ("low", "high"):
        for order in ("linear", "128x4"):
            stored = scale if order == "linear" else swizzle_128x4(scale)
            codes = packed if nibbles == "low" else swap_nibbles(packed)
            found = detect(base, codes, stored, global_scale)
            assert found.layout.nibbles in (nibbles, "equivalent", "undetermined")
            assert found.layout.scales in (order, "equivalent", "undetermined")
            if kind in ("gauss", "heavy", "tiny"):
                assert found.layout.nibbles == nibbles
                assert found.layout.scales == order


@pytest.mark.parametrize("kind", ["constant", "all zero", "symmetric"])
def test_what_cannot_be_told_apart_is_not_decided(kind: str) -> None:
    base = KINDS[kind](128, 64)
    global_scale = shared_global_scale([base]).clamp(min=1e-30)
    packed, scale = quantize_nvfp4(base, global_scale)
    assert detect(base, packed, scale, global_scale).layout.nibbles == "equivalent"


def test_equal_scales_are_equivalent_in_both_orders() -> None:
    base = equal_scales(128, 64)
    global_scale = shared_global_scale([base])
    packed, scale = quantize_nvfp4(base, global_scale)
    assert detect(base, packed, scale, global_scale).layout.scales == "equivalent"
    assert telling_rows(scale_readings(scale, 128, 4), 4) == []


def test_a_global_scale_far_off_is_not_taken_for_a_layout() -> None:
    base = gauss(128, 64)
    global_scale = shared_global_scale([base])
    packed, scale = quantize_nvfp4(base, global_scale)
    found = detect(base, packed, scale, global_scale * 2)
    assert (found.layout.nibbles, found.layout.scales, found.layout.global_scale) == (
        "undetermined",
    ) * 3 and found.related


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_hints_are_never_wrong(kind: str, seed: int) -> None:
    base = KINDS[kind](128, 256 + 64 * seed)
    global_scale = shared_global_scale([base]).clamp(min=1e-30)
    packed, scale = quantize_nvfp4(base, global_scale)
    for order, stored in (("linear", scale), ("128x4", swizzle_128x4(scale))):
        hint = hint_scale_order(packed.numpy(), raw_readings(stored, *scale.shape))
        assert hint in (order, "equivalent", "undetermined")
        if kind in ("gauss", "heavy"):
            assert hint == order


def test_a_zero_scale_over_codes_rules_an_order_out() -> None:
    base = gauss(128, 64)
    packed, scale = quantize_nvfp4(base, shared_global_scale([base]))
    raw = scale.view(torch.uint8).clone()
    codes = packed.clone()
    raw[0, 1] = 0
    codes[0, 8:16] = 0  # the zero scale lies over codes of zero in the linear order only
    readings = raw_readings(raw, 128, 4)
    assert hint_scale_order(codes.numpy(), readings) == "linear"


def test_common_answer() -> None:
    assert common_answer(["low", "low", "undetermined"]) == "low"
    assert common_answer(["linear", "128x4"]) == "mixed"
    assert common_answer(["equivalent"]) == "equivalent"
    assert common_answer(["equivalent", "undetermined"]) == "undetermined"
    assert common_answer([]) == "none"


def test_padding_that_is_not_zero_rules_a_reading_out() -> None:
    scale = torch.ones(130, 6).to(torch.float8_e4m3fn)
    stored = swizzle_128x4(scale)
    assert list(scale_readings(stored, 130, 6)) == ["128x4"]
    raw = stored.view(torch.uint8).clone()
    raw[-1, -1] = 1
    assert scale_readings(raw.view(torch.float8_e4m3fn), 130, 6) == {}


def test_every_known_shape_of_swizzled_scales_is_read() -> None:
    scale = torch.randint(1, 100, (130, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = scale.view(torch.float8_e4m3fn)
    swizzled = swizzle_128x4(scale)
    rows, columns = swizzled.shape
    padded = torch.zeros(144, 16, dtype=torch.uint8)  # ModelOpt's row_col: rows to 16, columns to 16 entries
    padded[:130, :6] = scale.view(torch.uint8)
    row_col = swizzle_128x4(padded.view(torch.float8_e4m3fn))
    for stored in (swizzled, swizzled.reshape(-1), swizzled.reshape(rows // 4, columns * 4), row_col):
        readings = scale_readings(stored, 130, 6)
        assert torch.equal(readings["128x4"].view(torch.uint8), scale.view(torch.uint8)), stored.shape
    linear = scale_readings(padded.view(torch.float8_e4m3fn), 130, 6)
    assert torch.equal(linear["linear"].view(torch.uint8), scale.view(torch.uint8))
    assert scale_readings(scale[:, :5].contiguous(), 130, 6) == {}


def test_pack_is_the_inverse_of_unpack_and_refuses_odd_columns() -> None:
    from modelopt_convert.formats.nvfp4.codes import unpack_e2m1

    every = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)
    with pytest.raises(ValueError, match="even"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))
