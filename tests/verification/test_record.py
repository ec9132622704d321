"""A record is a claim: where it is not what the bytes say verify fails, and no word of it makes the proof stronger."""

import copy as copies
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from dialect_files import MAKERS
from dialect_files import SHAPES as DIALECT_SHAPES
from faults import QUANTIZATION_CONFIG, seeded_weight, small_pair, swapped, write_transformer
from producers import max_calibration
from root import LONG
from support import load, run_mopt
from verify_support import SHARD, found, verify

from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES, CheckpointReader
from modelopt_convert.verification.levels.container import stored_format
from modelopt_convert.verification.subject import find_subject

SHAPES = {"blocks.0.ff": (64, 32), "blocks.1.ff": (48, 64)}
WRONG = (None, True, 0, -1, 7, 1.5, 10**30, "", "x", "proven", "pass", "0" * 32, [], ["x"], {}, {"x": 1})
GONE = object()
# Of the wrong values, so many for each field.
DRAWS = 12 if LONG else 1

Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small build, and its base. Never write there."""
    room = tmp_path_factory.mktemp("record")
    export, base = small_pair(room, SHAPES)
    where = ("--export", export, "--base", base, "--output", room / "out", "--preset", "none")
    outcome = run_mopt("build-nvfp4", *where, "--base-model", "me/it")
    assert outcome.exit_code == 0, outcome.stderr
    return room / "out", base


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mopt.json").read_text())
    return found


def fields(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every key and item, whole objects too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, one in items:
        yield (*path, key)
        yield from fields(one, (*path, key))


def at(node: Any, path: Path_) -> Any:
    for key in path:
        node = node[key]
    return node


def changed(record: dict[str, Any], path: Path_, source: random.Random) -> tuple[dict[str, Any], Any]:
    """The record with another value there, of any type, or without it."""
    record = copies.deepcopy(record)
    old = at(record, path)
    value = source.choice([one for one in (*WRONG, GONE) if one is GONE or json.dumps(one) != json.dumps(old)])
    if value is GONE:
        del at(record, path[:-1])[path[-1]]
    else:
        at(record, path[:-1])[path[-1]] = value
    return record, value


def test_no_field_of_the_record_can_be_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Digests fail; claims are quoted as claims, whatever they say, and the bytes stay what they are."""
    out, base = pair
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    record, wrong, source = record_of(out), [], random.Random(0)
    paths = list(fields(record))
    assert {path[0] for path in paths} >= {"schema", "tool", "command", "proof", "sources", "digests"}
    for path in paths:
        for _ in range(DRAWS):
            other, value = changed(record, path, source)
            (folder / "mopt.json").write_text(json.dumps(other))
            is_checked = path[0] in ("schema", "digests") and path[-1] != "README.md"  # the card is the user's
            is_checked &= path != ("digests", "shards") or value is not GONE  # as records of before
            for more in ((), ("--base", base)) if is_checked else ((),):
                outcome = verify(folder, *more)
                words = f"{path} {value!r} {more}: exit {outcome.exit_code}"
                assert outcome.exit_code in (0, 1, 3), words
                if is_checked or outcome.exit_code != 0:
                    wrong += [words] * (outcome.exit_code == 0)
                    continue
                said = found(outcome)
                is_claim = "its record claims (the author is not verified)" in said["statement"]
                wrong += [words] * (said["proof"] != "unchanged" or not is_claim)
    assert wrong == []


@pytest.mark.parametrize("value", [None, 7, [], {}, [[]]])
def test_a_claim_of_another_type_is_none(value: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """And ends nothing: what is left is that the bytes are those recorded."""
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    record = record_of(folder)
    kinds = ("proof", "sources", "command", "base_claimed", "tool")
    claims = [path for path in fields(record) if path[0] in kinds and len(path) <= 3]
    assert ("proof", "status") in claims and ("sources", "base", "headers_sha256") in claims
    for path in claims:
        other = copies.deepcopy(record)
        at(other, path[:-1])[path[-1]] = value
        (folder / "mopt.json").write_text(json.dumps(other))
        outcome = verify(folder)
        assert outcome.exit_code == 0 and found(outcome)["proof"] == "unchanged", (path, outcome.stderr)
        assert path != ("proof", "status") or "proven at build" not in found(outcome)["statement"]


def test_no_claim_makes_up_for_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a damaged module whose digest the record has, whatever else it says."""
    out, base = pair
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    tensors = load(folder)
    tensors["blocks.1.ff.weight"][5, 3] ^= 0x10
    record = with_digests(record_of(out), folder, tensors)
    source = random.Random(1)
    for path in fields({key: one for key, one in record.items() if key != "digests"}):
        for _ in range(DRAWS):
            other, value = changed(record, path, source)
            (folder / "mopt.json").write_text(json.dumps(other))
            outcome = verify(folder, "--base", base)
            assert outcome.exit_code in (1, 3), (path, value)
            assert outcome.exit_code == 3 or found(outcome)["proof"] == "mismatch", (path, value)


def with_digests(record: dict[str, Any], folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write other tensors under the same header, and give a record that has their digests."""
    raw = bytearray((folder / SHARD).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    record = copies.deepcopy(record)
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            data = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            raw[start:end] = data
            record["digests"]["tensors"][name] = xxhash.xxh3_128_hexdigest(data)
    (folder / SHARD).write_bytes(raw)
    return record


def test_a_record_written_by_hand_proves_no_random_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Ten keys, all digests right, and the proof of another model."""
    out, base = pair
    weights = {name: seeded_weight(*shape, seed + 100) for seed, (name, shape) in enumerate(SHAPES.items())}
    tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    for name, weight in weights.items():
        roles = ("weight", "weight_scale", "weight_scale_2")
        tensors |= {f"{name}.{role}": one for role, one in zip(roles, max_calibration(weight), strict=True)}
        tensors[f"{name}.input_scale"] = torch.tensor(0.01)
    config = {"_class_name": "SmallTransformer", "quantization_config": QUANTIZATION_CONFIG}
    folder = write_transformer(tmp_path / "made-up", tensors, config)
    digests = record_of(out)["digests"]
    (folder / "mopt.json").write_text(
        json.dumps(
            {
                "schema": "mopt.manifest/1",
                "command": "build-nvfp4",
                "base_repo": "black-forest-labs/FLUX.1-dev",
                "sources": {"base": {"repo": "black-forest-labs/FLUX.1-dev", "commit": "0" * 40, "origin": "hub"}},
                "proof": {
                    "status": "pass",
                    "words": "proven",
                    "modules": {name: {"verdict": "reproduced", "codes": 1, "codes_equal": 1} for name in weights},
                },
                "digests": digests
                | {"files": {"config.json": xxhash.xxh3_128_hexdigest((folder / "config.json").read_bytes())}},
            }
        )
    )
    (folder / "mopt.json").write_text(json.dumps(with_digests(record_of(folder), folder, tensors)))
    alone = verify(folder)
    assert alone.exit_code != 0 or found(alone)["proof"] == "unchanged"
    assert not found(alone)["statement"].startswith("proven") and "proven" not in found(alone)["proof"]
    told = run_mopt("verify", folder, json_report=False)
    assert "proven" not in told.stdout.splitlines()[0]
    outcome = verify(folder, "--base", base)
    assert outcome.exit_code == 1 and found(outcome)["proof"] == "mismatch"


@pytest.mark.parametrize(
    "name",
    [
        *("more.safetensors", "pytorch_model.bin", "transformer.pt", "hf_quant_config.json", "x.ckpt", "x.gguf"),
        *("x.sft", "X.SAFETENSORS", "x.pkl", "x.pickle", "x.onnx", "x.msgpack", "x.npz", "x.h5"),
        *("sub/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_weight_file_that_is_not_recorded_fails(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With the base too, which knows nothing of it."""
    out, base = pair
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        shutil.copy(folder / SHARD, folder / name)
    else:
        (folder / name).write_text("{}")
    for more in ((), ("--base", base)):
        outcome = verify(folder, *more)
        assert outcome.exit_code in (1, 3) and name in outcome.message, outcome.message
    (folder / "mopt.json").unlink()
    outcome = verify(folder, "--base", base)
    assert outcome.exit_code in (1, 3) and name in outcome.message, outcome.message


@pytest.fixture(scope="module")
def outputs(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """What mopt writes, each with its base: one shard, several, two transformers, rewrites. Never write there."""
    room, base = tmp_path_factory.mktemp("outputs"), pair[1]
    export = base.parent / "export"
    tensors = load(export)
    swapped(tensors)
    write_transformer(room / "swapped", tensors, json.loads((export / "config.json").read_text()))
    for name in ("transformer", "transformer_2"):
        shutil.copytree(export, room / "exports" / name)
        shutil.copytree(base, room / "bases" / name)
    plain = ("build-nvfp4", "--preset", "none", "--export")
    for command in (
        (*plain, export, "--base", base, "--max-shard-size", "2kB", "--output", room / "shards"),
        (*plain, room / "exports", "--base", room / "bases", "--output", room / "two"),
        ("swap-nibbles", room / "swapped", room / "rewrite", "--base", base),
        ("swap-nibbles", room / "swapped", room / "unproven"),
    ):
        assert run_mopt(*command).exit_code == 0, command
    assert len([*(room / "shards").glob("*.safetensors")]) > 1
    bases = {"shards": base, "two": room / "bases", "rewrite": base, "unproven": base}
    return {"build": pair} | {name: (room / name, one) for name, one in bases.items()}


@pytest.mark.parametrize("name", ["build", "shards", "two", "rewrite", "unproven"])
def test_a_renamed_weight_file_fails(name: str, outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Not a byte is another, but a loader finds weights by the names of files. With its index renamed, too."""
    out, base = outputs[name]
    source = random.Random(name)
    drawn = ["".join(source.choices("abcxyz0159_-", k=source.randint(1, 20))) for _ in range(20 if LONG else 2)]
    for stem in ("model", "diffusion_pytorch_model-00001-of-00009", *drawn):
        folder = Path(shutil.copytree(out, tmp_path / stem))
        shard = source.choice(sorted(folder.rglob("*.safetensors")))
        shard.rename(shard.with_name(f"{stem}.safetensors"))
        for index in folder.rglob("*.index.json"):
            index.write_text(index.read_text().replace(shard.name, f"{stem}.safetensors"))
        for more in ((), ("--base", base)):
            outcome = verify(folder, *more)
            assert outcome.exit_code == 1 and found(outcome)["proof"] == "mismatch", (stem, outcome.stdout)
            words = [one for level in found(outcome)["levels"] for one in level["failures"]]
            (said,) = (one for one in words if "weight files: expected" in one)
            assert f"{stem}.safetensors" in said.partition("found")[2] and shard.name in said.partition("found")[0]


def test_a_record_without_the_names_of_files_passes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As an older mopt wrote it."""
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    record = record_of(folder)
    assert record["digests"].pop("shards") == [SHARD]
    (folder / "mopt.json").write_text(json.dumps(record))
    for more, proof in (((), "unchanged"), (("--base", pair[1]), "proven")):
        outcome = verify(folder, *more)
        assert outcome.exit_code == 0 and found(outcome)["proof"] == proof, outcome.stderr


def test_other_files_of_a_download_pass(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    for name in (".gitattributes", "NOTES.md", ".cache/huggingface/x.safetensors", "images/one.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    outcome = verify(folder)
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "unchanged"
    assert found(outcome)["levels"][0]["warnings"] == ["NOTES.md is not recorded", "images is not recorded"]
    (folder / "mopt.json").unlink()
    outcome = verify(folder, "--base", pair[1])
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "proven"


@pytest.mark.parametrize(("key", "value"), [("num_layers", 3), ("_class_name", "OtherTransformer")])
def test_the_config_is_the_bases(key: str, value: object, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What the base does not say, and who wrote it, may differ."""
    out, base = (Path(shutil.copytree(one, tmp_path / one.name)) for one in pair)
    (out / "mopt.json").unlink()
    mine, theirs = (json.loads((one / "config.json").read_text()) for one in (out, base))
    (base / "config.json").write_text(json.dumps(theirs | {"num_layers": 2, "_diffusers_version": "1"}))
    said = mine | {"num_layers": 2, "_diffusers_version": "2", "more": 1}
    (out / "config.json").write_text(json.dumps(said))
    assert verify(out, "--base", base).exit_code == 0
    (out / "config.json").write_text(json.dumps(said | {key: value}))
    outcome = verify(out, "--base", base)
    assert outcome.exit_code == 1 and found(outcome)["proof"] == "mismatch"
    assert f"config.json: {key}: expected " in outcome.message and f"found {value!r}" in outcome.message


def test_what_the_record_says_of_its_proof_is_quoted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    record = record_of(folder)
    record["proof"] |= {"status": "not proven", "words": "not proven: near"}
    (folder / "mopt.json").write_text(json.dumps(record))
    assert found(verify(folder))["statement"].endswith("published it as not proven: near")


def test_odd_input_scales_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    tensors = load(folder)
    tensors["blocks.0.ff.input_scale"] = tensors["blocks.0.ff.weight_scale_2"].clone()
    (folder / "mopt.json").write_text(json.dumps(with_digests(record_of(folder), folder, tensors)))
    outcome = verify(folder)
    assert outcome.exit_code == 0
    (level,) = (one for one in found(outcome)["levels"] if one["level"] == "L0")
    assert level["status"] == "warn" and any("copied, and not calibrated" in one for one in level["warnings"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_of_no_number_is_refused_by_the_proof(value: float, tmp_path: Path) -> None:
    """In the base too, and whether or not the output is verified.

    The other modules are compared all the same, since one run tells all faults: there is a proof, and it failed.
    """
    pair, bias = small_pair(tmp_path, SHAPES), {"blocks.0.ff.bias": torch.full((64,), value, dtype=torch.bfloat16)}
    export, base = (
        write_transformer(tmp_path / "nan" / one.name, load(one) | bias, json.loads((one / "config.json").read_text()))
        for one in pair
    )
    for how in ("auto", "off"):
        where = ("--export", export, "--base", base, "--output", tmp_path / "out")
        outcome = run_mopt("build-nvfp4", *where, "--preset", "none", "--verify", how)
        assert (outcome.exit_code, outcome.error_code) == (3, "export.not_finite"), outcome.stderr
        assert "'blocks.0.ff.bias'" in outcome.message
        assert outcome.report is not None and outcome.report["proof"]["status"] == "fail"


def test_another_file_that_is_not_recorded_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    (folder / "notes.txt").write_text("mine")
    outcome = verify(folder)
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "unchanged"
    (level,) = (one for one in found(outcome)["levels"] if one["level"] == "record")
    assert level["status"] == "warn" and any("notes.txt" in words for words in level["warnings"])


@pytest.mark.parametrize("rows", [1, 2, 16, 63, 64, 4096])
def test_rows_are_never_called_a_proof(rows: int, pair: tuple[Path, Path]) -> None:
    """Not even where they are all that there are."""
    outcome = verify(pair[0], "--base", pair[1], "--sample", str(rows))
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "not proven: sampled"
    told = run_mopt("verify", pair[0], "--base", pair[1], "--sample", str(rows), json_report=False)
    assert told.stdout.startswith("not proven: sampled\n")


@pytest.mark.parametrize(("dialect", "maker"), MAKERS, ids=[f"{name}-{one.__name__}" for name, one in MAKERS])
@pytest.mark.parametrize("is_given_a_base", [False, True])
def test_random_bytes_of_no_format_pass(
    dialect: str, maker: Callable[[Path], Path], is_given_a_base: bool, tmp_path: Path
) -> None:
    """MXFP8 among them, of which nothing is compared."""
    made = maker(tmp_path / "made")
    folder = made if made.is_dir() else made.parent
    base = {f"{module}.weight": seeded_weight(*shape, 1) for module, shape in DIALECT_SHAPES.items()}
    theirs = write_transformer(tmp_path / "base", base, {"_class_name": "SmallTransformer"})
    for checkpoint in (made, folder):
        outcome = verify(checkpoint, *(("--base", theirs) if is_given_a_base else ()))
        assert outcome.exit_code in (1, 2, 3, 6), outcome.stdout
        said = (outcome.report or {}).get("verify")
        assert said is None or said["verdict"] != "pass"


def _linked(to: Path | str) -> Callable[[Path], object]:
    return lambda record: (record.unlink(), record.symlink_to(to))


NO_RECORDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda record: (record.unlink(), record.mkdir()), "input.not_regular"),
    "a pipe": (lambda record: (record.unlink(), os.mkfifo(record)), "input.not_regular"),
    "a link to a device": (_linked("/dev/zero"), "input.symlink_escape"),
    "a link to what never ends": (_linked("/proc/kmsg"), "input.symlink_escape"),
    "a link to nothing": (_linked("nothing"), "input.missing"),
    "more than any record": (lambda record: os.truncate(record, MAX_INDEX_BYTES + 1), "record.too_large"),
}


@pytest.mark.parametrize("what", NO_RECORDS)
def test_what_is_no_file_is_no_missing_record(pair: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    """With a base, too, and of a pipeline; nothing waits for it, and no link leads out."""
    spoil, code = NO_RECORDS[what]
    folder = Path(shutil.copytree(pair[0], tmp_path / "out"))
    spoil(folder / "mopt.json")
    above = tmp_path / "above"
    shutil.copytree(pair[0], above / "transformer")
    shutil.copy(pair[0] / "mopt.json", above)
    spoil(above / "mopt.json")
    for where in ((folder,), (folder, "--base", pair[1]), (above,)):
        outcome = verify(*where)
        assert (outcome.exit_code, outcome.error_code) == (3, code), outcome.stderr


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_the_digests_of_rows_are_those_of_what_kernels_multiply(name: str, exports: Path, tmp_path: Path) -> None:
    """Tables decode rows for the digests, torch decodes whole weights for the kernels."""
    source = exports / name / "transformer"
    if name == "nvfp4":
        done = run_mopt("unswizzle-scales", source, tmp_path / "swizzled", "--reverse")
        assert done.exit_code == 0
    for folder in (source, *tmp_path.glob("swizzled")):
        with CheckpointReader(folder) as reader:
            subject = find_subject(reader, None)
            rules = stored_format(subject.format.algorithm)
            for layout in (subject.layout, replace(subject.layout, nibbles="high")):
                other = replace(subject, layout=layout)
                for module in subject.modules.values():
                    rows = [0, module.rows // 2, module.rows - 1]
                    wanted = other.operands(module, rows).decode(0, len(rows)).to(torch.float32)
                    assert rules.decoded(other, module, rows).tobytes() == wanted.numpy().tobytes()
