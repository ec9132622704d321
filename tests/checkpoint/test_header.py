"""The header parser and builder against safetensors itself, and one input for every way to be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save, save_file
from safetensors_files import ODD_NAMES, TORCH, content_of, entry, make, pack, parse, reference

from modelopt_convert.checkpoint.header import MAX_HEADER_BYTES, TensorSpec, build_header, read_header_length
from modelopt_convert.run.errors import InputError
from modelopt_convert.stage.shard_writer import METADATA, ShardWriter

NAMES = st.sampled_from(ODD_NAMES) | st.text(max_size=6).filter(lambda name: name != "__metadata__")
# 0 and 1 often; few enough elements that hundreds of cases stay quick.
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=4).map(tuple)
SPECS = st.tuples(st.sampled_from(sorted(TORCH)), SHAPES).filter(lambda spec: spec[0] != "F4" or spec[1])
TENSORS = st.tuples(st.dictionaries(NAMES, SPECS, max_size=6), st.integers(0, 1 << 32))


@settings(deadline=None, max_examples=150)
@given(TENSORS)
def test_what_safetensors_wrote_is_read_right(made: tuple[dict[str, Any], int]) -> None:
    tensors, content = make(*made)
    file = save(tensors, {"format": "pt"})
    header = parse(file)
    stated = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert header.metadata == stated.pop("__metadata__") == {"format": "pt"}
    data_start = 8 + int.from_bytes(file[:8], "little")
    assert header.tensors.keys() == tensors.keys()
    for name, info in header.tensors.items():
        assert (info.name, info.file) == (name, "f")
        assert {"dtype": info.dtype, "shape": list(info.shape)} == {k: stated[name][k] for k in ("dtype", "shape")}
        assert [info.start - data_start, info.start + info.num_bytes - data_start] == stated[name]["data_offsets"]
        assert file[info.start : info.start + info.num_bytes] == content[name]
    assert content_of(file) == reference(file)
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(deadline=None, max_examples=150)
@given(TENSORS)
def test_what_we_write_is_what_save_file_writes(scratch: Path, made: tuple[dict[str, Any], int]) -> None:
    tensors, content = make(*made)
    save_file(tensors, scratch / "theirs.safetensors", {"format": "pt"})
    theirs = (scratch / "theirs.safetensors").read_bytes()
    # torch counts F4 in pairs, the format one by one.
    specs = [TensorSpec(n, d, (*s[:-1], s[-1] * 2) if d == "F4" else s) for n, (d, s) in made[0].items()]
    head, placed, size = build_header(specs, METADATA)
    assert theirs.startswith(head)
    assert size == len(theirs)
    for spec, start in placed:
        assert theirs[start : start + spec.num_bytes] == content[spec.name]
    ours = scratch / "ours.safetensors"
    ours.unlink(missing_ok=True)
    with ShardWriter(ours, specs) as writer:
        for name, raw in content.items():
            writer.write(name, [raw[:3], raw[3:]])
    assert ours.read_bytes() == theirs


def test_without_metadata_none_is_written() -> None:
    assert build_header([TensorSpec("a", "F16", (1,))], {})[0] == save({"a": torch.zeros(1).half()})[:-2]


@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["metadata", "none"])
@pytest.mark.parametrize(
    "names", [["__metadata__"], ["x" * 4097], ["\u00e9" * 2049], ["a", "a"]], ids=["reserved", "long", "utf8", "twice"]
)
def test_names_that_cannot_be_written(names: list[str], metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="reserved, too long or given twice"):
        build_header([TensorSpec(name, "U8", (1,)) for name in names], metadata)


ONE = entry("U8", [1], 0, 1)
GAP = "offset_gap_or_overlap"
RAW_ONE = json.dumps(ONE).encode()
NESTED = b"[" * 100_000 + b"]" * 100_000

# (what, the file, the code after "header."). Data is given wherever it would be right, so that one rule is broken.
REFUSED: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "too_small"),
    ("seven bytes", b"\x02" + bytes(6), "too_small"),
    ("just over the limit", (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "too_large"),
    ("highest length", b"\xff" * 8 + b"{}", "too_large"),
    ("at the limit, not there", MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}", "truncated"),
    ("one byte short", (3).to_bytes(8, "little") + b"{}", "truncated"),
    ("no header", bytes(8), "json"),
    ("another kind of file", b"version https://git-lfs.github.com/spec/v1\n", "foreign"),
    ("not UTF-8", pack(b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "json"),
    ("UTF-8 of a surrogate", pack(b'{"\xed\xa0\x80":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "json"),
    ("lone surrogate", pack(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "json"),
    ("NaN", pack(b'{"__metadata__":{"a":NaN}}'), "json"),
    ("Infinity", pack(b'{"a":{"dtype":"U8","shape":[-Infinity],"data_offsets":[0,1]}}', b"x"), "json"),
    ("100,000 lists", pack(b'{"a":' + NESTED + b"}"), "json"),
    ("100,000 objects", pack(b'{"a":' * 100_000 + b"0" + b"}" * 100_000), "json"),
    ("5,000 digits", pack(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % (b"9" * 5000), b"x"), "json"),
    ("a list", pack(b"[]"), "json"),
    ("space first", pack(b" {}"), "json"),
    ("byte order mark", pack(b"\xef\xbb\xbf{}"), "json"),
    ("UTF-16", pack("{}".encode("utf-16-le")), "json"),
    ("two objects", pack(b"{}{}"), "json"),
    ("NUL padding", pack(b"{}\0\0"), "json"),
    ("comma at the end", pack(b'{"__metadata__":{},}'), "json"),
    ("cut", pack(b'{"__metadata__":{}'), "json"),
    ("control character", pack(b'{"__metadata__":{"a":"\n"}}'), "json"),
    ("other twin", pack(b'{"a":%s,"a":1}' % RAW_ONE, b"x"), "duplicate_key"),
    ("identical twins", pack(b'{"a":%(a)s,"a":%(a)s}' % {b"a": RAW_ONE}, b"x"), "duplicate_key"),
    ("escaped twin", pack(b'{"a":%(a)s,"\\u0061":%(a)s}' % {b"a": RAW_ONE}, b"x"), "duplicate_key"),
    ("twin field", pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "duplicate_key"),
    ("twin metadata", pack(b'{"__metadata__":{"a":"b","a":"b"}}'), "duplicate_key"),
    ("two metadata", pack(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate_key"),
    ("metadata value", pack({"__metadata__": {"format": 1}}), "metadata"),
    ("metadata null", pack({"__metadata__": {"format": None}}), "metadata"),
    ("metadata list", pack({"__metadata__": ["format", "pt"]}), "metadata"),
    ("metadata tensor", pack({"__metadata__": ONE}, b"x"), "metadata"),
    ("not an entry", pack({"a": [1]}), "entry"),
    ("no dtype", pack({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "entry"),
    ("no shape", pack({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "entry"),
    ("no offsets", pack({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "entry"),
    ("one key more", pack({"a": {**ONE, "strides": [1]}}, b"x"), "entry"),
    ("4,097 bytes of name", pack({"x" * 4097: ONE}, b"x"), "entry"),
    ("2,049 characters of 2 bytes", pack({"\u00e9" * 2049: ONE}, b"x"), "entry"),
    ("unknown dtype", pack({"a": entry("U9", [1], 0, 1)}, b"x"), "dtype"),
    ("dtype in small letters", pack({"a": entry("u8", [1], 0, 1)}, b"x"), "dtype"),
    ("dtype not a string", pack({"a": entry(["U8"], [1], 0, 1)}, b"x"), "dtype"),
    ("negative", pack({"a": entry("U8", [-1, -1], 0, 1)}, b"x"), "shape"),
    ("float", pack({"a": entry("U8", [1.0], 0, 1)}, b"x"), "shape"),
    ("true", pack({"a": entry("U8", [True], 0, 1)}, b"x"), "shape"),
    ("string", pack({"a": entry("U8", ["1"], 0, 1)}, b"x"), "shape"),
    ("not a list", pack({"a": entry("U8", 1, 0, 1)}, b"x"), "shape"),
    ("rank 65", pack({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "shape"),
    ("2**63", pack({"a": entry("U8", [0, 1 << 63], 0, 0)}), "shape"),
    ("one offset", pack({"a": entry("U8", [1], 0)}, b"x"), "offsets"),
    ("three offsets", pack({"a": entry("U8", [1], 0, 1, 1)}, b"x"), "offsets"),
    ("offsets not a list", pack({"a": {**ONE, "data_offsets": {"0": 1}}}, b"x"), "offsets"),
    ("negative offset", pack({"a": entry("U8", [1], -1, 0)}, b"x"), "offsets"),
    ("true as offset", pack({"a": entry("U8", [1], 0, True)}, b"x"), "offsets"),
    ("float as offset", pack({"a": entry("U8", [1], 0.0, 1)}, b"x"), "offsets"),
    ("backwards", pack({"a": entry("U8", [1], 1, 0)}, b"x"), "offsets"),
    ("offset 2**63", pack({"a": entry("U8", [1], (1 << 63) - 1, 1 << 63)}, b"x"), "offsets"),
    ("three times 4 bits", pack({"a": entry("F4", [3], 0, 1)}, b"x"), "misaligned"),
    ("two times 6 bits", pack({"a": entry("F6_E2M3", [2], 0, 1)}, b"x"), "misaligned"),
    ("too few bytes", pack({"a": entry("F16", [2], 0, 3)}, b"xxx"), "size_mismatch"),
    ("too many bytes", pack({"a": entry("F16", [2], 0, 5)}, b"xxxxx"), "size_mismatch"),
    ("none for a scalar", pack({"a": entry("U8", [], 0, 0)}), "size_mismatch"),
    ("highest dimension", pack({"a": entry("U8", [(1 << 63) - 1], 0, 1)}, b"x"), "size_mismatch"),
    ("2**64 + 1 bytes", pack({"a": entry("U8", [274177, 67280421310721], 0, 1)}, b"x"), "size_mismatch"),
    ("gap in front", pack({"a": entry("U8", [1], 1, 2)}, b"xx"), GAP),
    ("gap", pack({"a": ONE, "b": entry("U8", [1], 2, 3)}, b"xxx"), GAP),
    ("overlap", pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx"), GAP),
    ("same bytes twice", pack({"a": ONE, "b": ONE}, b"x"), GAP),
    ("nothing beyond the end", pack({"a": ONE, "b": entry("U8", [0], 2, 2)}, b"xx"), GAP),
    ("nothing in between", pack({"a": entry("F16", [1], 0, 2), "b": entry("U8", [0], 1, 1)}, b"xx"), GAP),
    ("tail", pack({"a": ONE}, b"xx"), "file_length"),
    ("tail after no tensors", pack(b"{}", b"x"), "file_length"),
    ("short", pack({"a": entry("U8", [2], 0, 2)}, b"x"), "file_length"),
]  # fmt: skip

# Read otherwise by safetensors: -0 is a float to it, and a product that overflows is refused wherever the 0 stands.
MORE_LENIENT_THAN_SAFETENSORS = [
    ("minus zero", pack(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape"),
    ("minus zero as offset", pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}'), "offsets"),
    ("overflow before a zero", pack({"a": entry("U8", [1 << 32, 1 << 32, 0], 0, 0)}), "shape"),
]


@pytest.mark.parametrize(("file", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(file: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(file)
    assert caught.value.code == f"header.{code}"
    assert caught.value.path == "f"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("file", "code"),
    [row[1:] for row in MORE_LENIENT_THAN_SAFETENSORS],
    ids=[row[0] for row in MORE_LENIENT_THAN_SAFETENSORS],
)
def test_refused_because_safetensors_refuses(file: bytes, code: str) -> None:
    with pytest.raises(Exception, match="Error while deserializing"):
        deserialize(file)
    with pytest.raises(InputError) as caught:
        parse(file)
    assert caught.value.code == f"header.{code}"


@pytest.mark.parametrize(
    "file",
    [
        pack(b"{}"),
        pack(b"{} \t\r\n"),
        pack({"__metadata__": {}}),
        pack({"x" * 4096: ONE}, b"x"),
        pack({"\u00e9" * 2048: ONE}, b"x"),
        pack({"a": entry("U8", [1] * 64, 0, 1)}, b"x"),
        pack({"a": entry("U8", [0, (1 << 63) - 1], 0, 0)}),
        pack({"a": entry("F4", [2], 0, 1), "b": entry("F6_E3M2", [4], 1, 4)}, b"xxxx"),
        pack({"a": ONE, "y": entry("U8", [0], 1, 1), "z": entry("U8", [0], 0, 0)}, b"x"),
        pack({"b": entry("U8", [1], 1, 2), "a": ONE}, b"xy"),
    ],
    ids=[
        "no tensor",
        "space",
        "metadata",
        "name",
        "utf8",
        "rank",
        "dimension",
        "4 and 6 bits",
        "empty",
        "out of order",
    ],
)
def test_accepted_at_the_limits(file: bytes) -> None:
    assert content_of(file) == reference(file)


def test_header_length_at_the_limit() -> None:
    prefix = MAX_HEADER_BYTES.to_bytes(8, "little")
    assert read_header_length(prefix, file="f", file_bytes=8 + MAX_HEADER_BYTES) == MAX_HEADER_BYTES


def test_a_short_prefix_is_refused_whatever_the_size() -> None:
    with pytest.raises(InputError) as caught:
        read_header_length(b"\x02" + bytes(6), file="f", file_bytes=100)
    assert caught.value.code == "header.too_small"


def test_a_hostile_name_is_escaped_and_cut_in_the_message() -> None:
    with pytest.raises(InputError) as caught:
        parse(pack({"\x1b[2J\u202e" + "x" * 4000: entry("U9", [1], 0, 1)}, b"x"))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
