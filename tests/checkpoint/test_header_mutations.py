"""Headers that are damaged after decoding, bit by bit and at every length: refused, or read as safetensors does."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from figures import note
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from safetensors_files import ODD_NAMES, content_of, make, pack, parse, reference

from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.run.errors import InputError

BASE = {"a": ("F32", (2, 3)), "b": ("F16", (4,)), "c": ("U8", (0,)), "d": ("U8", (8,))}
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 8, 24, 32, 40, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, True, 1.0])
LISTS = st.lists(INTEGERS, max_size=3) | st.permutations([2, 3])
JUNK = (
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)
Change = tuple[str, str, Any]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("dtype"), st.sampled_from("abcd"), st.sampled_from([*DTYPE_BITS, "X8"]) | JUNK),
        st.tuples(st.just("shape"), st.sampled_from("abcd"), LISTS | JUNK),
        st.tuples(st.just("data_offsets"), st.sampled_from("abcd"), LISTS | JUNK),
        st.tuples(st.just("shift"), st.sampled_from("abcd"), st.integers(-9, 9)),
        st.tuples(st.just("swap"), st.sampled_from("abcd"), st.sampled_from("abcd")),
        st.tuples(st.just("rename"), st.sampled_from("abcd"), st.sampled_from([*"abcd", "__metadata__", *ODD_NAMES])),
        st.tuples(st.just("without"), st.sampled_from("abcd"), st.sampled_from(["dtype", "shape", "data_offsets", ""])),
        st.tuples(st.just("metadata"), st.just(""), JUNK | st.dictionaries(st.text(max_size=2), JUNK, max_size=2)),
        st.tuples(st.just("data"), st.just(""), st.integers(-3, 3)),
    ),
    min_size=1,
    max_size=3,
)


def changed(changes: Iterable[Change]) -> bytes:
    """BASE with its decoded header changed, encoded again with a right length."""
    original = save(make(BASE, 1)[0])
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    for kind, name, value in changes:
        found = header.get(name)
        if kind == "data":
            data = data[:value] if value < 0 else data + b"x" * value
        elif kind == "metadata":
            header["__metadata__"] = value
        elif found is None:
            continue  # an earlier change took it away
        elif kind == "rename":
            header[value] = header.pop(name)
        elif kind == "without":
            header.pop(name) if value == "" else found.pop(value, None)
        elif kind == "swap":
            header[name], header[value] = header.get(value, found), found
        elif kind == "shift":
            with_offsets = isinstance(found.get("data_offsets"), list)
            found["data_offsets"] = [offset + value for offset in found["data_offsets"]] if with_offsets else value
        else:
            found[kind] = value
    return pack(header, data)


DEEP: list[tuple[list[Change], str | None]] = [
    ([("dtype", "b", "BF16")], None),
    ([("shape", "a", [3, 2])], None),
    ([("swap", "a", "b")], None),
    ([("metadata", "", {"format": "pt"})], None),
    ([("without", "a", "shape")], "header.entry"),
    ([("dtype", "a", "X8")], "header.dtype"),
    ([("shape", "a", [2, -3])], "header.shape"),
    ([("data_offsets", "a", [0])], "header.offsets"),
    ([("dtype", "d", "F4"), ("shape", "d", [3])], "header.misaligned"),
    ([("dtype", "a", "F64")], "header.size_mismatch"),
    ([("shift", "d", 1)], "header.offset_gap_or_overlap"),
    ([("without", "a", "")], "header.offset_gap_or_overlap"),
    ([("data", "", 1)], "header.file_length"),
    ([("data", "", -1)], "header.file_length"),
    ([("rename", "a", "__metadata__")], "header.metadata"),
]


@pytest.mark.parametrize(("changes", "code"), DEEP, ids=repr)
def test_changes_reach_every_deep_rule(changes: list[Change], code: str | None) -> None:
    """The examples that the next test cannot do without: each rule behind the JSON is met, and so is acceptance."""
    file = changed(changes)
    if code is None:
        assert content_of(file) == reference(file)
        assert content_of(file) != content_of(changed([])) or parse(file).metadata
        return
    with pytest.raises(InputError) as caught:
        parse(file)
    assert caught.value.code == code


def test_whatever_the_header_says_it_is_refused_or_read_as_safetensors_does() -> None:
    seen: Counter[str] = Counter()

    @settings(deadline=None, max_examples=500)
    @given(CHANGES)
    @example(DEEP[0][0])
    @example(DEEP[4][0])
    def law(changes: list[Change]) -> None:
        file = changed(changes)
        try:
            ours = content_of(file)
        except InputError as error:
            seen[error.code] += 1
            return
        seen["accepted"] += 1
        assert ours == reference(file)

    law()
    note(4, what="changed headers", cases=seen.total(), escapes=0)
    # Not a measure of luck: both come from the examples above, so the law was really applied on either side.
    assert seen["accepted"] and seen["header.entry"]


def test_every_flipped_bit_is_refused_or_read_as_safetensors_does() -> None:
    file = save(make({"a": ("F16", (2,)), "b": ("U8", (1, 3))}, 2)[0])
    length = int.from_bytes(file[:8], "little")
    accepted = 0
    for position in range(8 + length):
        for bit in range(8):
            flipped = bytearray(file)
            flipped[position] ^= 1 << bit
            try:
                ours = content_of(bytes(flipped))
            except InputError:
                continue
            assert ours == reference(bytes(flipped))
            accepted += 1
    note(4, what="flipped bits", cases=8 * (8 + length), escapes=0)
    assert accepted  # a letter of a name, for one


def test_cut_or_grown_anywhere_is_refused() -> None:
    file = save(make({"a": ("F32", (2,)), "b": ("BF16", (1, 3)), "empty": ("U8", (0,))}, 3)[0], {"format": "pt"})
    parse(file)
    for size in range(len(file)):
        with pytest.raises(InputError, match="f: "):
            parse(file[:size])
    for more in (b"\0", b" ", b"}", bytes(8)):
        with pytest.raises(InputError) as caught:
            parse(file + more)
        assert caught.value.code == "header.file_length"
    note(7, file="shard", lengths=len(file), accepted=0)
