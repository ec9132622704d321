"""Which base it was: all bytes of its weight files, digested while they are compared, in builds, rewrites and verify.

What is read says whether a digest is there. Another base is told, and decides nothing.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import small_pair, swapped
from loopback_hub import LoopbackHub
from safetensors.torch import save_file
from support import Outcome, Tensors, content_of, edit, edit_json, load, run_mopt
from verify_support import SHARD, found, verify

from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.reader import CheckpointReader

SHAPES = {"blocks.0.ff": (300, 128), "blocks.1.ff": (70, 320), "blocks.2.ff": (64, 64)}
TOLD = "the base is not, byte for byte, the one that the record names"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small export and its base. Never write there."""
    return small_pair(tmp_path_factory.mktemp("content"), SHAPES)


@pytest.fixture(scope="module")
def built(pair: tuple[Path, Path]) -> Path:
    """Of the pair, as a whole. Never write there."""
    out = pair[0].parent / "built"
    assert made(*pair, out).exit_code == 0
    return out


def made(export: Path | None, base: Path | str, out: Path, *more: str | Path) -> Outcome:
    given = ("--preset", "none") if export is None else ("--preset", "none", "--export", export)
    return run_mopt("build-nvfp4", *given, "--base", base, "--output", out, *more)


def sources(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "mopt.json").read_text())["sources"]
    return found


def told(outcome: Outcome) -> list[str]:
    """What the level of the record warns of."""
    return [words for words in found(outcome)["levels"][0]["warnings"] if words.startswith(TOLD)]


def sharded(source: Path, target: Path) -> Path:
    """The same tensors in two files."""
    tensors = load(source)
    target.mkdir()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, target / file, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    shutil.copy(source / "config.json", target)
    return target


def widened(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("kind", ["one file", "two files", "F32", "kept in BF16"])
def test_a_build_records_and_reports_all_bytes_of_its_base(
    kind: str, workers: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    export, base = pair
    if kind == "two files":
        base = sharded(base, tmp_path / "base")
    elif kind == "F32":
        base = edit(base, tmp_path / "base", widened)
    more = ("--keep-bf16", "blocks.1.ff") if kind == "kept in BF16" else ()
    outcome = made(export, base, tmp_path / "out", "--workers", workers, *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    recorded = sources(tmp_path / "out")
    assert recorded["base"]["content_xxh3_128"] == content_of(base)
    assert outcome.report["inputs"]["base"]["identity"] == recorded["base"]
    assert "content_xxh3_128" not in recorded["export"]


def test_fp8_and_what_is_near_have_it_too(exports: Path, tmp_path: Path) -> None:
    base = exports / "base" / "transformer"
    words = ("convert-fp8", "--preset", "flux1-dev", "--export", exports / "fp8", "--output", tmp_path / "out")
    assert run_mopt(*words, "--base", base).exit_code == 0
    assert sources(tmp_path / "out")["base"]["content_xxh3_128"] == content_of(base)


def test_a_base_that_is_near_is_digested_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of one whose weights were trained on since: attempts are given up early, and one goes to the end."""
    export, base = pair

    def trained(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.03
            if name.startswith("blocks."):
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)

    other = edit(base, tmp_path / "base", trained)
    outcome = made(export, other, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["words"] == "not proven: near"
    assert sources(tmp_path / "out")["base"]["content_xxh3_128"] == content_of(other)


def test_a_base_that_is_quantized_here_is_digested(base: Path, tmp_path: Path) -> None:
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--base", base, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    assert sources(tmp_path / "out")["base"]["content_xxh3_128"] == content_of(base / "transformer")


@pytest.mark.parametrize("proof", ["all", "sampled"])
@pytest.mark.parametrize("place", ["disk", "hub"])
def test_a_base_of_which_rows_were_read_has_no_digest(
    proof: str, place: str, hub: LoopbackHub, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    export, base = pair
    hub.seed("alice/base", base)
    where = base if place == "disk" else "hf://alice/base"
    outcome = made(export, where, tmp_path / "out", "--proof", proof)
    assert outcome.exit_code == 0, outcome.stderr
    recorded = sources(tmp_path / "out")["base"]
    assert recorded.get("content_xxh3_128") == (content_of(base) if proof == "all" else None)
    assert ("commit" in recorded) is (place == "hub")


def test_not_a_byte_is_read_for_it(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, base = pair
    num_bytes: list[int] = []
    read, read_into = LocalFile.read, LocalFile.read_into

    def counted(self: LocalFile, offset: int, num: int) -> bytes:
        num_bytes.append(num)
        return read(self, offset, num)

    def counted_into(self: LocalFile, offset: int, target: memoryview) -> None:
        num_bytes.append(target.nbytes)
        read_into(self, offset, target)

    monkeypatch.setattr(LocalFile, "read", counted)
    monkeypatch.setattr(LocalFile, "read_into", counted_into)
    assert made(export, base, tmp_path / "with").exit_code == 0
    digested, num_bytes[:] = sorted(num_bytes), []
    monkeypatch.setattr(CheckpointReader, "digest_content", lambda self: None)
    assert made(export, base, tmp_path / "without").exit_code == 0
    assert sorted(num_bytes) == digested and "content_xxh3_128" not in sources(tmp_path / "without")["base"]


def test_a_rewrite_records_its_base_and_tells_of_another(pair: tuple[Path, Path], built: Path, tmp_path: Path) -> None:
    export, base = pair
    source = edit(export, tmp_path / "source", swapped)
    words = ("swap-nibbles", source, tmp_path / "out")
    outcome = run_mopt(*words, "--base", base)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert sources(tmp_path / "out")["base"]["content_xxh3_128"] == content_of(base)
    assert outcome.report["warnings"] == []
    assert "base" not in sources(built_without(source, tmp_path / "without"))
    # Of what has a record, which names the base.
    cast = edit(base, tmp_path / "cast", widened)
    for against, expected in ((base, []), (cast, ["base.not_recorded"])):
        room = tmp_path / f"of-{against.name}"
        outcome = run_mopt("unswizzle-scales", built, room, "--reverse", "--base", against)
        assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
        assert [one["code"] for one in outcome.report["warnings"]] == expected
        assert outcome.report["proof"]["words"] == "proven"
        assert (f"warning: {TOLD}" in outcome.stderr) is bool(expected)
        assert sources(room)["base"]["content_xxh3_128"] == content_of(against)
        assert not told(verify(room, "--base", against)) and told(verify(room, "--base", base if expected else cast))


def built_without(source: Path, out: Path) -> Path:
    assert run_mopt("swap-nibbles", source, out).exit_code == 0
    return out


def test_a_record_that_cannot_be_read_is_told_by_a_rewrite(pair: tuple[Path, Path], tmp_path: Path) -> None:
    export, base = pair
    source = edit(export, tmp_path / "source", swapped)
    (source / "mopt.json").write_text('{"schema": "other"}')
    outcome = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert [one["code"] for one in outcome.report["warnings"]] == ["record.content"]


def test_a_record_beside_a_single_file_is_not_of_that_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    export, base = pair
    source = edit(export, tmp_path / "source", swapped)
    (source / "mopt.json").write_text("not JSON")
    outcome = run_mopt("swap-nibbles", source / SHARD, tmp_path / "out", "--base", base)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["warnings"] == []


ANOTHER: dict[str, Callable[[Path, Path], Path]] = {
    "F32": lambda base, room: edit(base, room, widened),
    "two files": sharded,
    "header": lambda base, room: edit(base, room, lambda tensors: None),
}


@pytest.mark.parametrize("kind", ANOTHER)
def test_verify_tells_of_another_base_that_proves_the_same(
    kind: str, pair: tuple[Path, Path], built: Path, tmp_path: Path
) -> None:
    _, base = pair
    assert not told(verify(built, "--base", base))
    other = ANOTHER[kind](base, tmp_path / "other")
    if kind == "header":
        tensors = load(other)
        save_file(tensors, other / SHARD, {"format": "pt", "by": "somebody"})
    outcome = verify(built, "--base", other)
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "proven" and found(outcome)["verdict"] == "pass"
    assert found(outcome)["levels"][0]["status"] == "warn"
    (words,) = told(outcome)
    assert content_of(other)[:12] in words and content_of(base)[:12] in words
    # Rows alone do not tell, and no base is no other base.
    for more in (("--base", other, "--sample", "4"), ()):
        assert not told(verify(built, *more))


def test_a_digest_in_the_record_makes_nothing_weaker_or_stronger(
    pair: tuple[Path, Path], built: Path, tmp_path: Path
) -> None:
    """Whatever it is: the verdict, the exit and every other level are those without it."""
    folder = Path(shutil.copytree(built, tmp_path / "out"))
    wrong = edit(pair[1], tmp_path / "wrong", lambda tensors: tensors["blocks.1.ff.weight"].mul_(-1))
    values = [content_of(wrong), "0" * 32, "", 7, None, [], {}, ["x"], True]
    for base, exit_code, proof in ((pair[1], 0, "proven"), (wrong, 1, "mismatch")):
        seen = []
        for value in [content_of(base), *random.Random(0).sample(values, 5)]:
            change = {"content_xxh3_128": value}
            edit_json(folder / "mopt.json", lambda record, new=change: record["sources"]["base"].update(new))
            outcome = verify(folder, "--base", base)
            assert (outcome.exit_code, found(outcome)["proof"]) == (exit_code, proof), value
            assert bool(told(outcome)) is (value not in (content_of(base), None))
            seen.append([found(outcome)["levels"][1:], found(outcome)["verdict"], found(outcome)["statement"]])
        assert all(one == seen[0] for one in seen)


def test_each_of_two_transformers_has_its_own(pair: tuple[Path, Path], built: Path, tmp_path: Path) -> None:
    export, base = pair
    for name in ("transformer", "transformer_2"):
        shutil.copytree(export, tmp_path / "export" / name)
    shutil.copytree(base, tmp_path / "base" / "transformer")
    sharded(base, tmp_path / "base" / "transformer_2")
    outcome = made(tmp_path / "export", tmp_path / "base", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    digests = {name: content_of(tmp_path / "base" / name) for name in ("transformer", "transformer_2")}
    assert len(set(digests.values())) == 2
    for name, digest in digests.items():
        assert sources(tmp_path / "out" / name)["base"]["content_xxh3_128"] == digest
        assert outcome.report["inputs"][f"{name}/base"]["identity"]["content_xxh3_128"] == digest
