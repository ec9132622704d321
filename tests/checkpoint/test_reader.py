"""Opening checkpoint folders: what is read, and what is refused with which code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, SHARDS, SINGLE, WEIGHT_MAP, A, B, C, open_fds, reader_refusal, write
from safetensors.torch import save_file
from support import load

from modelopt_convert.checkpoint import reader
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import InputError


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", {SINGLE: {n: t for tensors in SHARDS.values() for n, t in tensors.items()}})


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_read_right(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    (folder / "README.md").write_text("x")
    (folder / "more.bin").write_bytes(b"x")
    (folder / "assets").mkdir()
    tensors = load(folder)
    with CheckpointReader(folder) as reader:
        assert reader.config == {"_class_name": "X"}
        assert reader.files == tuple(sorted({SINGLE} if kind == "single" else SHARDS))
        assert reader.metadata == {file: {"format": "pt"} for file in reader.files}
        assert reader.skipped == ("README.md", "assets", "more.bin")
        assert reader.num_bytes == sum((folder / file).stat().st_size for file in reader.files)
        assert reader.tensors.keys() == tensors.keys() == WEIGHT_MAP.keys()
        for name, tensor in tensors.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            info = reader.tensors[name]
            assert info.file == (SINGLE if kind == "single" else WEIGHT_MAP[name])
            assert (info.name, info.shape, info.num_bytes) == (name, tuple(tensor.shape), len(raw))
            assert reader.read(name) == raw
            assert reader.read_range(name, len(raw) // 2, len(raw) // 3) == raw[len(raw) // 2 :][: len(raw) // 3]
            pieces = list(reader.chunks(name, 4))
            assert b"".join(pieces) == raw
            assert all(len(piece) == 4 for piece in pieces[:-1]) and all(0 < len(piece) <= 4 for piece in pieces)
        assert len(open_fds(folder)) == len(reader.files)
    assert open_fds(folder) == []


VARIANTS = [SINGLE.replace(".", ".fp16.", 1), A.replace(".", ".bf16."), A.replace("-", ".non_ema-", 1)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_variant_beside_the_plain_weights_is_skipped(kind: str, variant: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    save_file({"other": torch.ones(1)}, folder / variant)
    variant_index = INDEX.replace(".json", ".fp16.json")
    (folder / variant_index).write_text(json.dumps({"weight_map": {"other": variant}}))
    with CheckpointReader(folder) as reader:
        assert reader.tensors.keys() == WEIGHT_MAP.keys() and variant not in reader.files
        assert reader.skipped == tuple(sorted((variant, variant_index)))


def test_variants_alone_are_not_chosen_among(tmp_path: Path) -> None:
    write(tmp_path, {variant: SHARDS[A] for variant in VARIANTS[:2]})
    error = reader_refusal(tmp_path)
    assert error.code == "input.ambiguous" and all(variant in error.message for variant in VARIANTS[:2])
    (tmp_path / VARIANTS[1]).unlink()
    with CheckpointReader(tmp_path) as reader:
        assert reader.files == (VARIANTS[0],)


@pytest.mark.parametrize("files", [(A,), (A, B, C)])
def test_a_variant_that_the_index_names_is_read(files: tuple[str, ...], sharded: Path) -> None:
    named = {file: file.replace("-", ".non_ema-", 1) for file in files}
    for file, variant in named.items():
        (sharded / file).rename(sharded / variant)
    write(sharded, {}, {name: named.get(file, file) for name, file in WEIGHT_MAP.items()})
    with CheckpointReader(sharded) as reader:
        assert {*named.values()} <= {*reader.files} and reader.tensors.keys() == WEIGHT_MAP.keys()


def test_one_file_without_its_folder(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"model_type": "of another tool"}')
    with CheckpointReader(sharded / B) as reader:
        assert (reader.path, reader.folder, reader.files, reader.config) == (sharded / B, sharded, (B,), {})
        assert reader.tensors.keys() == SHARDS[B].keys()
        assert reader.read("b.weight") == bytes(SHARDS[B]["b.weight"].tolist())
    assert reader_refusal(sharded / "config.json").code.startswith("header.")
    (sharded / A).rename(sharded.parent / A)
    (sharded / A).symlink_to(sharded.parent / A)
    assert reader_refusal(sharded / A).code == "input.symlink_escape"


def test_a_folder_that_needs_no_config(sharded: Path) -> None:
    CheckpointReader(sharded, need_config=False).__exit__(None, None, None)
    (sharded / "config.json").rename(sharded / "old.json")
    with CheckpointReader(sharded, need_config=False) as reader:
        assert reader.config == {}
        assert reader.tensors.keys() == WEIGHT_MAP.keys()
    (sharded / "config.json").write_text("not JSON")
    with pytest.raises(InputError) as caught:
        CheckpointReader(sharded, need_config=False)
    assert caught.value.code == "config.json"


def test_identity_is_of_the_headers_and_not_of_the_place(single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "elsewhere"))
    tensors = load(single)
    tensors["d.weight"] = tensors.pop("c.weight")  # a header of the same length
    other = write(tmp_path / "other", {SINGLE: tensors})
    identities = []
    for folder in (single, copy, other):
        with CheckpointReader(folder) as reader:
            identities.append(reader.identity())
    assert identities[0] == identities[1] != identities[2]
    assert identities[0].keys() == {"headers_sha256", "origin"} and identities[0]["origin"] == "folder"


def _change_map(**changes: object) -> Callable[[Path], object]:
    return lambda folder: write(folder, {}, WEIGHT_MAP | changes)


def _text(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def _link(folder: Path, file: str) -> None:
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)


def _link_twice(folder: Path) -> None:
    """A link to a link inside, which leads outside."""
    _link(folder, A)
    (folder / A).rename(folder / "inside")
    (folder / A).symlink_to("inside")


def _link_to_namesake(folder: Path) -> None:
    """Beside the folder, with a name that begins with the folder's."""
    other = folder.with_name(folder.name + "-more")
    other.mkdir()
    (folder / A).rename(other / A)
    (folder / A).symlink_to(f"../{other.name}/{A}")


def _two_files(folder: Path) -> None:
    """Two whole files, neither of which is a shard."""
    for name in (INDEX, *SHARDS):
        (folder / name).unlink()
    for name in (SINGLE, "other.safetensors"):
        save_file(SHARDS[A], folder / name)


def _replace_by_directory(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()


ESCAPES = ["../x.safetensors", "/x.safetensors", f"./{A}", "x/y.safetensors", "x\\y.safetensors", "C:x.safetensors"]
ESCAPES += ["x\0.safetensors", ".x.safetensors", ".safetensors", "..", "", "config.json", f"{A}/", f"{A} "]

TWICE = SHARDS[B] | {"a.bias": torch.ones(1)}
LATER = WEIGHT_MAP | {"a.bias": B}

# (what, the change to a sharded checkpoint, the code, words that the message or hint must have)
REFUSED: list[tuple[str, Callable[[Path], object], str, tuple[str, ...]]] = [
    ("shards alone", lambda f: (f / INDEX).unlink(), "index.missing", (INDEX, "beside 3 shards", "is missing")),
    ("two files", _two_files, "input.ambiguous", (SINGLE, "other.safetensors")),
    ("two indexes", _text("old.safetensors.index.json", "{}"), "input.ambiguous", (INDEX, "old.safetensors.index")),
    ("an empty index", _text(INDEX, '{"weight_map": {}}'), "index.weight_map", (INDEX,)),
    ("no shard", lambda f: [(f / file).unlink() for file in SHARDS], "input.missing", ("found none",)),
    ("no file", lambda f: [(f / file).unlink() for file in (INDEX, *SHARDS)], "input.missing", ("found none",)),
    ("shard missing", lambda f: (f / B).unlink(), "input.missing", (B,)),
    ("no config", lambda f: (f / "config.json").unlink(), "input.missing", ("config.json",)),
    ("shard is a directory", lambda f: _replace_by_directory(f, B), "input.not_regular", (B, "drwx")),
    ("config is a directory", lambda f: _replace_by_directory(f, "config.json"), "input.not_regular", ("config.json",)),
    ("index is a directory", lambda f: _replace_by_directory(f, INDEX), "input.not_regular", (INDEX,)),
    ("shard linked outside", lambda f: _link(f, B), "input.symlink_escape", (B,)),
    ("config linked outside", lambda f: _link(f, "config.json"), "input.symlink_escape", ("config.json",)),
    ("index linked outside", lambda f: _link(f, INDEX), "input.symlink_escape", (INDEX,)),
    ("linked outside in two steps", _link_twice, "input.symlink_escape", (A,)),
    ("linked beside", _link_to_namesake, "input.symlink_escape", (A,)),
    ("empty shard", lambda f: (f / B).write_bytes(b""), "header.too_small", (B,)),
    ("index lists more", _change_map(ghost=A), "index.mismatch", ("ghost", A)),
    ("index has it elsewhere", _change_map(**{"a.bias": B}), "index.mismatch", ("a.bias", B)),
    ("index lists less", lambda f: write(f, {A: {**SHARDS[A], "new": torch.ones(1)}}), "index.mismatch", ("new", A)),
    ("in two shards", lambda f: write(f, {B: TWICE}), "index.mismatch", ("a.bias", "also in", A)),
    ("in two, later listed", lambda f: write(f, {B: TWICE}, LATER), "index.mismatch", ("a.bias", "also in", A)),
    *(
        (f"index names {name!r}", _change_map(ghost=name), "index.path_escape", (repr(name),))
        for name in ESCAPES
    ),
    ("file not a string", _change_map(ghost=1), "index.weight_map", ("weight_map",)),
    ("file null", _change_map(ghost=None), "index.weight_map", ("weight_map",)),
    ("weight_map a list", lambda f: write(f, {}, [A, B, C]), "index.weight_map", ("weight_map",)),
    ("no weight_map", _text(INDEX, "{}"), "index.weight_map", ("weight_map",)),
    ("index a list", _text(INDEX, "[]"), "index.json", (INDEX,)),
    ("index not JSON", _text(INDEX, "x"), "index.json", (INDEX,)),
    ("index twice", _text(INDEX, '{"weight_map": {"a.bias": "x", "a.bias": "x"}}'), "index.duplicate_key", ("a.bias",)),
    ("config a list", _text("config.json", "[]"), "config.json", ("config.json",)),
    ("config a string", _text("config.json", '"x"'), "config.json", ("config.json",)),
    ("config empty", _text("config.json", ""), "config.json", ("config.json",)),
    ("config with NaN", _text("config.json", '{"a": NaN}'), "config.json", ("NaN",)),
    ("config nested", _text("config.json", '{"a":' + "[" * 100_000), "config.json", ("config.json",)),
    ("config in Latin-1", lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'), "config.json", ("utf-8",)),
    ("config twice", _text("config.json", '{"a": {"b": 1, "b": 1}}'), "config.duplicate_key", ("'b'",)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(sharded: Path, change: Callable[[Path], object], code: str, words: tuple[str, ...]) -> None:
    change(sharded)
    error = reader_refusal(sharded)
    assert error.code == code
    for word in words:
        assert word in f"{error.message}\n{error.hint}"


def _name_in_latin1(folder: Path) -> None:
    (folder / INDEX).unlink()
    for file in (B, C):
        (folder / file).unlink()
    (folder / A).rename(folder / os.fsdecode(b"\xe9.safetensors"))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_name_in_latin1, None),
        (lambda f: [(f / B).unlink(), (f / B).symlink_to(B)], "input.unreadable"),
        (shutil.rmtree, "input.missing"),
    ],
    ids=["name not UTF-8", "link to itself", "folder gone"],
)
def test_refused_and_not_a_crash(sharded: Path, change: Callable[[Path], object], code: str | None) -> None:
    change(sharded)
    try:
        CheckpointReader(sharded).__exit__(None, None, None)
    except InputError as error:
        assert code in (None, error.code)
    else:
        assert code is None


@pytest.mark.parametrize(("limit", "file", "code"), [("CONFIG", "config.json", "config"), ("INDEX", INDEX, "index")])
def test_too_large(sharded: Path, monkeypatch: pytest.MonkeyPatch, limit: str, file: str, code: str) -> None:
    size = (sharded / file).stat().st_size
    monkeypatch.setattr(reader, f"MAX_{limit}_BYTES", size)
    CheckpointReader(sharded).__exit__(None, None, None)
    monkeypatch.setattr(reader, f"MAX_{limit}_BYTES", size - 1)
    assert reader_refusal(sharded).code == f"{code}.too_large"


@pytest.mark.parametrize("file", [INDEX, B, "config.json"])
def test_cut_anywhere_is_refused(sharded: Path, file: str) -> None:
    whole = (sharded / file).read_bytes()
    for size in range(len(whole)):
        (sharded / file).write_bytes(whole[:size])
        assert reader_refusal(sharded).code.partition(".")[0] == {INDEX: "index", B: "header"}.get(file, "config")


def test_resolve_component(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    write(pipeline / "transformer", {SINGLE: SHARDS[A]})
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "vae").mkdir()
    assert resolve_component(pipeline / "transformer", what="export") == pipeline / "transformer"
    assert resolve_component(pipeline, what="export") == pipeline / "transformer"
    (pipeline / "transformer").rename(pipeline / "transformer_2")
    assert resolve_component(pipeline, what="export") == pipeline / "transformer_2"


def test_resolve_component_refuses(tmp_path: Path) -> None:
    two = tmp_path / "two"
    for name in ("transformer", "transformer_2"):
        write(two / name, {SINGLE: SHARDS[A]})
    (tmp_path / "empty" / "transformer").mkdir(parents=True)
    cases = {"two": "input.ambiguous", "empty": "input.missing", "absent": "input.missing"}
    for name, code in cases.items():
        with pytest.raises(InputError) as caught:
            resolve_component(tmp_path / name, what="base")
        assert caught.value.code == code
        assert f"base {tmp_path / name}" in caught.value.message
        assert caught.value.hint
        if name == "two":
            assert "found transformer and transformer_2" in caught.value.message
