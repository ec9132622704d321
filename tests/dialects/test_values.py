"""Recipes that change values give, for any range, what the pure functions give for the whole."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.recipe import Constant, Elsewhere, Extent, Recipe
from modelopt_convert.dialects.decoded import Decoded
from modelopt_convert.dialects.values import Cast, Mapped, Requantized
from modelopt_convert.formats.arithmetic import rebased_bytes
from modelopt_convert.formats.fp8.codes import dequantize_fp8, quantize_fp8
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4, quantize_nvfp4
from modelopt_convert.formats.tensor_bytes import to_bytes


class Files:
    """Files in memory, which note what is read of them."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.taken: list[Extent] = []

    def __call__(self, file: str, start: int, target: memoryview) -> None:
        self.taken.append(Extent(file, start, target.nbytes))
        target[:] = self.files[file][start : start + target.nbytes]


def check(recipe: Recipe, whole: torch.Tensor, files: Files, draw: st.DataObject) -> None:
    wanted = bytes(to_bytes(whole.contiguous()))
    assert recipe.num_bytes == len(wanted)
    begin = draw.draw(st.integers(0, len(wanted)))
    count = draw.draw(st.integers(0, len(wanted) - begin))
    for first, size in ((0, len(wanted)), (begin, count)):
        target = bytearray(b"?" * size)
        files.taken.clear()
        recipe.fill(first, memoryview(target), files)
        assert bytes(target) == wanted[first : first + size]
        said = {
            (one.file, place)
            for one in recipe.extents(first, size)
            for place in range(one.start, one.start + one.num_bytes)
        }
        took = {(one.file, place) for one in files.taken for place in range(one.start, one.start + one.num_bytes)}
        assert took <= said


def extent(data: bytes, name: str) -> Extent:
    return Extent(name, 0, len(data))


sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_nvfp4(size: tuple[int, int, int], draw: st.DataObject) -> None:
    rows, blocks, seed = size
    weight = torch.randn(rows, blocks * 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    factor = weight.abs().amax().float() / 2688
    codes, scales = quantize_nvfp4(weight, factor)
    files = Files(c=bytes(to_bytes(codes)), s=bytes(to_bytes(scales)), w=bytes(to_bytes(weight)))
    values = dequantize_nvfp4(codes, scales, factor)
    places = extent(files.files["c"], "c"), extent(files.files["s"], "s"), Constant(bytes(to_bytes(factor)))
    parts = "nvfp4", rows, blocks * 16, *places
    check(Decoded(*parts, "F32"), values, files, draw)
    check(Decoded(*parts, "BF16"), values.bfloat16(), files, draw)
    source = extent(files.files["w"], "w")
    check(Requantized(source, "BF16", "codes", float(factor)), codes, files, draw)
    check(Requantized(source, "BF16", "scales", float(factor)), scales, files, draw)
    check(Cast(source, "BF16", "F32"), weight.float(), files, draw)


@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_fp8_by_one_scale_and_by_row(size: tuple[int, int, int], draw: st.DataObject) -> None:
    rows, columns, seed = size
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scale = weight.abs().amax().float() / 448 + 1e-6
    codes = quantize_fp8(weight, scale)
    by_row = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    files = Files(c=bytes(to_bytes(codes)), s=bytes(to_bytes(by_row)), w=bytes(to_bytes(weight)))
    source, one = extent(files.files["c"], "c"), Constant(bytes(to_bytes(scale)))
    check(Decoded("fp8", rows, columns, source, None, one, "F32"), dequantize_fp8(codes, scale), files, draw)
    rows_of = Decoded("fp8", rows, columns, source, extent(files.files["s"], "s"), None, "BF16")
    check(rows_of, (codes.float() * by_row).bfloat16(), files, draw)
    check(Requantized(extent(files.files["w"], "w"), "BF16", "fp8", float(scale)), codes, files, draw)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(0.01, 1.0), st.data())
def test_rebased(size: tuple[int, int, int], ratio: float, draw: st.DataObject) -> None:
    rows, columns, seed = size
    codes = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    files = Files(**{"base/c": bytes(to_bytes(codes))})
    values = codes.view(torch.float8_e4m3fn).float() * ratio
    recipe = Mapped(Elsewhere(Extent("c", 0, codes.numel()), "base"), rebased_bytes(ratio, 1.0))
    check(recipe, values.clamp(-448, 448).to(torch.float8_e4m3fn), files, draw)
