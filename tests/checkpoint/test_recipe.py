"""Recipes give, for any range, what torch gives for the whole; and they take of files what they say."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import (
    Constant,
    Cut,
    Extent,
    Joined,
    NibblesSwapped,
    Recipe,
    RowMajor,
    Tiled,
    Zeros,
    halves_swapped,
    joined_rows,
    padded_rows,
    recipe_of,
    rows_of,
)
from modelopt_convert.formats.nvfp4.codes import swap_nibbles_
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4, unswizzle_128x4
from modelopt_convert.formats.nvfp4.shapes import padded_shape


class Files:
    """Files in memory, which note what is read of them."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.taken: list[Extent] = []

    def __call__(self, file: str, start: int, target: memoryview) -> None:
        assert 0 <= start <= start + target.nbytes <= len(self.files[file])
        self.taken.append(Extent(file, start, target.nbytes))
        target[:] = self.files[file][start : start + target.nbytes]


def read(recipe: Recipe, begin: int, num_bytes: int, files: Files) -> bytes:
    target = bytearray(b"?" * num_bytes)
    recipe.fill(begin, memoryview(target), files)
    return bytes(target)


def check(recipe: Recipe, whole: bytes, files: Files, draw: st.DataObject) -> None:
    """The whole, and any range, by what the recipe says that it takes."""
    assert recipe.num_bytes == len(whole)
    assert read(recipe, 0, len(whole), files) == whole
    begin = draw.draw(st.integers(0, len(whole)))
    count = draw.draw(st.integers(0, len(whole) - begin))
    files.taken.clear()
    assert read(recipe, begin, count, files) == whole[begin : begin + count]
    if count:
        assert files.taken == list(recipe.extents(begin, count))


def random_bytes(count: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).numpy().tobytes()


SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 19))


@given(shape=SHAPES, seed=st.integers(0, 99), draw=st.data())
def test_scales_go_into_the_tiled_order_as_torch_brings_them_there(
    shape: tuple[int, int], seed: int, draw: st.DataObject
) -> None:
    raw = random_bytes(shape[0] * shape[1], seed)
    scales = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(shape)
    files = Files(f=b"head" + raw)
    check(Tiled(Extent("f", 4, len(raw)), *shape), swizzle_128x4(scales).numpy().tobytes(), files, draw)


@given(shape=SHAPES, seed=st.integers(0, 99), draw=st.data())
def test_scales_come_out_of_the_tiled_order_as_torch_takes_them_out(
    shape: tuple[int, int], seed: int, draw: st.DataObject
) -> None:
    stored = random_bytes(padded_shape(*shape)[0] * padded_shape(*shape)[1], seed)  # padding is not zero here
    swizzled = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    wanted = unswizzle_128x4(swizzled, *shape).numpy().tobytes()
    files = Files(f=stored)
    check(RowMajor(Extent("f", 0, len(stored)), *shape), wanted, files, draw)
    assert read(RowMajor(Tiled(Constant(wanted), *shape), *shape), 0, len(wanted), files) == wanted


@given(raw=st.binary(min_size=1, max_size=300), draw=st.data())
def test_nibbles_are_swapped_as_torch_swaps_them(raw: bytes, draw: st.DataObject) -> None:
    wanted = swap_nibbles_(torch.frombuffer(bytearray(raw), dtype=torch.uint8)).numpy().tobytes()
    check(NibblesSwapped(Extent("f", 0, len(raw))), wanted, Files(f=raw), draw)
    twice = NibblesSwapped(NibblesSwapped(Extent("f", 0, len(raw))))
    assert read(twice, 0, len(raw), Files(f=raw)) == raw


@given(parts=st.lists(st.binary(max_size=40), min_size=1, max_size=5), draw=st.data())
def test_stretches_are_joined_and_cut(parts: list[bytes], draw: st.DataObject) -> None:
    files = Files(**{f"f{number}": part for number, part in enumerate(parts)})
    joined = Joined((*(Extent(f"f{number}", 0, len(part)) for number, part in enumerate(parts)), Zeros(3)))
    whole = b"".join(parts) + bytes(3)
    check(joined, whole, files, draw)
    start = draw.draw(st.integers(0, len(whole)))
    count = draw.draw(st.integers(0, len(whole) - start))
    check(Cut(joined, start, count), whole[start : start + count], files, draw)


@given(rows=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 99), draw=st.data())
def test_rows_are_cut_joined_exchanged_and_padded(rows: int, width: int, seed: int, draw: st.DataObject) -> None:
    raw = random_bytes(2 * rows * width, seed)
    files = Files(f=raw)
    info = TensorInfo("w", "U8", (2 * rows, width), "f", 0, len(raw))
    at = draw.draw(st.integers(0, 2 * rows))
    parts = [rows_of(info, "upper", 0, at), rows_of(info, "lower", at, 2 * rows - at)]
    assert read(recipe_of(parts[0]), 0, parts[0].num_bytes, files) == raw[: at * width]
    assert joined_rows("w", parts).shape == info.shape
    check(recipe_of(joined_rows("w", parts)), raw, files, draw)
    exchanged = halves_swapped(info, "w")
    check(recipe_of(exchanged), raw[rows * width :] + raw[: rows * width], files, draw)
    check(recipe_of(halves_swapped(exchanged, "w")), raw, files, draw)
    padded = padded_rows(info, "w", 16)
    assert padded.shape == (-(-2 * rows // 16) * 16, width)
    check(recipe_of(padded), raw + bytes(padded.num_bytes - len(raw)), files, draw)
