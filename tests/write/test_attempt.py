"""One shard's task by itself, done in this process: plain data, the same file however often, and nothing half done."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from support import run_mopt

from modelopt_convert import __version__
from modelopt_convert.checkpoint import recipe
from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.location import parse_location
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.recipe import halves_swapped, joined_rows
from modelopt_convert.dialects import decoded, resized, values
from modelopt_convert.dialects.form import constant
from modelopt_convert.plan.plan import Op, ShardPlan, Step
from modelopt_convert.run.errors import InputError, MoptError, RemoteError, StorageError, UsageError
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.write.attempt import ATTEMPTS, ShardJob, attempt, attempt_packed, pack, unpack
from modelopt_convert.write.executors import refuse_far
from modelopt_convert.write.part import part_of
from modelopt_convert.write.recipe_data import from_data, to_data
from modelopt_convert.write.task import shard_tasks

FILE = "model-00002-of-00002.safetensors"
NAMES = ("a.weight", "b.bias", "c.weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of two files; the tasks of these tests read the second and one tensor of the first."""
    folder = tmp_path / "source"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: torch.randn(40, 8) for name in (*NAMES, "unused.weight")}
    save_file({name: tensors[name] for name in ("a.weight", "unused.weight")}, folder / "one.safetensors")
    save_file({name: tensors[name] for name in ("b.bias", "c.weight")}, folder / "two.safetensors")
    files = {
        name: "one.safetensors" if name in ("a.weight", "unused.weight") else "two.safetensors" for name in tensors
    }
    weight_map = ", ".join(f'"{name}": "{file}"' for name, file in files.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    (folder / "config.json").write_text("{}")
    return folder


def test_recipes_are_sent_as_plain_data(source: Path, tmp_path: Path) -> None:
    """Of two files at once, with known bytes between: what is written is what is read here."""
    (tmp_path / "stage" / ATTEMPTS).mkdir(parents=True)
    with CheckpointReader(source) as reader:
        known = constant("k", "F32", (1, 8), bytes(range(32)), "one.safetensors")
        parts = [reader.tensors["c.weight"], known, halves_swapped(reader.tensors["a.weight"], "a.weight")]
        reader.present({"a.weight": joined_rows("a.weight", parts)})
        spec = TensorSpec("a.weight", "F32", (81, 8))
        plan = SimpleNamespace(shards=(ShardPlan(FILE, (spec,)),), steps={spec.name: Step(spec, "base", "copy")})
        (task,) = shard_tasks(plan, {}, "")
        job = ShardJob(task, {"base": part_of(reader, "base", task)}, tmp_path / "stage", 2)
        wanted = reader.read("a.weight")
    assert set(job.parts["base"].files) == {"one.safetensors", "two.safetensors"}
    attempt_packed(__version__, pack(job))
    assert load_file(tmp_path / "stage" / FILE)["a.weight"].numpy().tobytes() == wanted


EXTENT = recipe.Extent("one.safetensors", 8, 64)
RECIPES: list[recipe.Recipe] = [
    EXTENT,
    recipe.Joined((recipe.Zeros(4), recipe.Cut(EXTENT, 1, 2), recipe.Constant(b"\xff\0"))),
    recipe.Tiled(recipe.RowMajor(recipe.NibblesSwapped(EXTENT), 3, 5), 3, 5),
    values.Mapped(values.Cast(EXTENT, "F32", "BF16"), bytes(256)),
    values.Requantized(EXTENT, "BF16", "scales", 0.5),
    decoded.Decoded("nvfp4", 2, 32, EXTENT, EXTENT, None, "F32"),
    resized.Columns(EXTENT, 2, 3, 4),
]


@pytest.mark.parametrize("made", RECIPES, ids=lambda one: type(one).__name__)
def test_a_recipe_comes_back_as_it_was(made: recipe.Recipe) -> None:
    assert from_data(json.loads(json.dumps(to_data(made)))) == made


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> bytes:
    """The shard as safetensors itself writes it."""
    tensors = {}
    for name in ("one", "two"):
        tensors |= load_file(source / f"{name}.safetensors")
    wanted = {name: tensors[name].bfloat16() if name == "c.weight" else tensors[name] for name in NAMES}
    save_file(wanted, tmp_path / "expected", {"format": "pt"})
    return (tmp_path / "expected").read_bytes()


@pytest.fixture
def job(source: Path, tmp_path: Path) -> ShardJob:
    """Two tensors copied, one rounded; the stage is ready."""
    operations: dict[str, Op] = {"a.weight": "copy", "b.bias": "copy", "c.weight": "cast_bf16"}
    specs = [TensorSpec(name, "BF16" if op == "cast_bf16" else "F32", (40, 8)) for name, op in operations.items()]
    steps = {spec.name: Step(spec, "base", operations[spec.name]) for spec in specs}
    plan = SimpleNamespace(shards=(ShardPlan(FILE, tuple(specs)),), steps=steps)
    (tmp_path / "stage" / ATTEMPTS).mkdir(parents=True)
    with CheckpointReader(source) as reader:
        (task,) = shard_tasks(plan, {}, "")
        return ShardJob(task, {"base": part_of(reader, "base", task)}, tmp_path / "stage", 2)


def written(job: ShardJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in job.stage.iterdir() if path.is_file()}


def test_a_task_is_plain_data_and_parses_no_header(
    job: ShardJob, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_convert.checkpoint.reader.parse_header", None)
    odd = replace(job, stage=Path("/no utf-8: \udcff"))
    assert (unpack(pack(job)), unpack(pack(odd))) == (job, odd)
    assert {info.name for info in job.parts["base"].tensors} == set(NAMES)
    result = attempt_packed(__version__, pack(job))
    assert written(job) == {FILE: expected} and not list((job.stage / ATTEMPTS).iterdir())
    assert result.num_bytes == len(expected) and result.durable and set(result.digests) == set(NAMES)
    files = [load_file(path) for path in sorted(job.parts["base"].folder.glob("*.safetensors"))]
    raw = {name: one[name].numpy().tobytes() for one in files for name in one if name in NAMES}
    assert result.content == {name: xxhash.xxh3_128_hexdigest(data) for name, data in raw.items()}


def test_done_twice_it_is_the_same(job: ShardJob, expected: bytes) -> None:
    assert attempt(job) == attempt(job)
    assert written(job) == {FILE: expected}


def test_done_again_after_a_half_written_attempt(
    job: ShardJob, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def half(self: ShardWriter, name: str, *more: Any) -> None:
        if name == "b.bias":
            raise KeyboardInterrupt
        write(self, name, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", half)
        with pytest.raises(KeyboardInterrupt):
            attempt(job)
    assert written(job) == {}  # nothing has the shard's name before it is whole
    (left,) = (job.stage / ATTEMPTS).iterdir()
    assert left.stat().st_size == len(expected)
    attempt(job)
    assert written(job) == {FILE: expected}


def test_an_attempt_that_was_given_up_gets_nowhere(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node came back after the driver had finished."""
    write = ShardWriter.write

    def late(self: ShardWriter, name: str, *more: Any) -> None:
        write(self, name, *more)
        shutil.rmtree(job.stage / ATTEMPTS, ignore_errors=True)

    monkeypatch.setattr(ShardWriter, "write", late)
    with pytest.raises(FileNotFoundError):
        attempt(job)
    assert list(job.stage.iterdir()) == []


def test_an_input_that_is_another_now_is_refused(job: ShardJob, source: Path) -> None:
    path = source / "two.safetensors"
    (source / "copy").write_bytes(path.read_bytes())
    (source / "copy").rename(path)  # the same bytes, of another moment
    with pytest.raises(InputError) as caught:
        attempt(job)
    assert caught.value.code == "input.changed" and caught.value.path == str(path)
    assert written(job) == {} and not list((job.stage / ATTEMPTS).iterdir())


def test_an_input_that_changes_meanwhile_is_refused(
    job: ShardJob, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = LocalFile.read_into

    def touching(self: LocalFile, offset: int, target: memoryview) -> None:
        read_into(self, offset, target)
        (source / "one.safetensors").touch()

    monkeypatch.setattr(LocalFile, "read_into", touching)
    with pytest.raises(InputError) as caught:
        attempt(job)
    assert caught.value.code == "input.changed" and written(job) == {}


def test_what_a_node_does_not_see_is_named(job: ShardJob, source: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        attempt(replace(job, stage=job.stage / "elsewhere"))
    assert caught.value.code == "executor.shared_filesystem" and "elsewhere" in caught.value.message
    (source / "one.safetensors").unlink()
    with pytest.raises(RemoteError) as caught:
        attempt(job)
    assert caught.value.code == "executor.shared_filesystem" and "one.safetensors" in caught.value.message


def test_another_version_is_refused_before_the_job_is_read() -> None:
    with pytest.raises(RemoteError) as caught:
        attempt_packed("0.0.0", b"no job")
    assert caught.value.code == "executor.version" and __version__ in caught.value.message


@pytest.mark.parametrize("kind", MoptError.__subclasses__())
def test_errors_come_whole_out_of_another_process(kind: type[MoptError]) -> None:
    error = (
        UsageError("--out", "what") if kind is UsageError else kind("what", code="some.code", path="/there", hint="do")
    )
    if isinstance(error, StorageError):
        error.published, error.kept_at = True, "/here"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and vars(again) == vars(error) and str(again) == str(error)
    assert again.exit_code is error.exit_code


def test_ray_that_is_not_installed(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    places = ("--base", exports / "base", "--output", tmp_path / "out", "--executor", "ray")
    for words in (
        ("build-nvfp4", "--preset", "flux1-dev", *places),
        ("convert-fp8", "--export", exports / "fp8", *places),
        ("swap-nibbles", exports / "nvfp4", tmp_path / "out", "--executor", "ray"),
    ):
        outcome = run_mopt(*words)
        assert (outcome.exit_code, outcome.error_code) == (3, "executor.not_installed")
        assert "pip install ray" in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_inputs_on_the_hub_are_for_threads_alone(tmp_path: Path) -> None:
    for words in (
        ("build-nvfp4", "--preset", "flux1-dev", "--output", tmp_path / "out"),  # the preset's own base
        ("build-nvfp4", "--preset", "flux1-dev", "--base", "hf://a/b", "--output", tmp_path / "out", "--download"),
        ("swap-nibbles", "hf://a/b", tmp_path / "out"),
    ):
        outcome = run_mopt(*words, "--executor", "ray")
        assert (outcome.exit_code, outcome.error_code) == (3, "executor.hub_input"), outcome
        assert "hf download" in outcome.message
    refuse_far("threads", parse_location("hf://a/b"))
    refuse_far("ray", tmp_path, None)
