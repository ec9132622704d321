"""NaN and infinity are found by their bits: torch's ``isfinite`` is the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelopt_convert.formats.finite import FiniteWatch, NotFinite, not_finite_words

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Of each dtype: the largest finite value, infinity, and the NaN next to it, by their bits, and those with a sign.
EDGES = {
    "BF16": [one | sign for one in (0x7F7F, 0x7F80, 0x7F81, 0x7FFF, 0) for sign in (0, 0x8000)],
    "F16": [one | sign for one in (0x7BFF, 0x7C00, 0x7C01, 0x7FFF, 0) for sign in (0, 0x8000)],
    "F32": [one | sign for one in (0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0) for sign in (0, 1 << 31)],
}


def watched(values: torch.Tensor, dtype: str, sizes: list[int]) -> NotFinite | None:
    """What is found where the bytes come in pieces of so many values."""
    watch = FiniteWatch(dtype, values.shape)
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    width, at = values.dtype.itemsize, 0
    for size in [*sizes, len(raw)]:
        watch.add(memoryview(raw)[at : at + size * width])
        at += size * width
    return watch.found()


def expected(values: torch.Tensor) -> NotFinite | None:
    odd = ~values.isfinite()
    if not bool(odd.any()):
        return None
    first = odd.nonzero()[0].tolist() if values.ndim else []
    return NotFinite(int(odd.count_nonzero()), tuple(first))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_what_is_found_is_what_torch_calls_not_finite(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    width = DTYPES[dtype].itemsize
    bits = rng.integers(0, 1 << (8 * width), size=shape, dtype=f"u{width}")
    drawn = torch.from_numpy(np.atleast_1d(bits).astype(f"i{width}")).view(DTYPES[dtype])
    values = torch.where(drawn.isfinite(), drawn, torch.ones((), dtype=DTYPES[dtype])).reshape(shape)
    flat = values.reshape(-1)
    for edge in data.draw(st.lists(st.sampled_from(EDGES[dtype]), max_size=3)):
        place = data.draw(st.integers(0, flat.numel() - 1))
        flat.view(torch.int16 if width == 2 else torch.int32)[place] = int(np.uint32(edge).astype(f"i{width}"))
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=4))
    assert watched(flat.reshape(shape), dtype, sizes) == expected(flat.reshape(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(10))
def test_each_edge_alone(dtype: str, number: int) -> None:
    width = DTYPES[dtype].itemsize
    bits = torch.zeros(64, dtype=torch.int16 if width == 2 else torch.int32)
    bits[37] = int(np.uint32(EDGES[dtype][number]).astype(f"i{width}"))
    values = bits.view(DTYPES[dtype]).reshape(8, 8)
    found = watched(values, dtype, [5, 20])
    assert found == expected(values) and (found is None) is (number in (0, 1, 8, 9))


def test_ten_tensors_are_named_and_all_are_counted() -> None:
    words = not_finite_words({f"blocks.{number}": NotFinite(number + 1, (number, 2)) for number in range(12)})
    assert words.startswith("78 values of 12 tensors are NaN or infinity: blocks.0 (1, first at [0, 2]), blocks.1 (2")
    assert "blocks.9 (10, first at [9, 2]) and 2 more;" in words and "blocks.10" not in words
    assert "more" not in not_finite_words({"a": NotFinite(1, ())})
