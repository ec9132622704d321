"""When OUT is taken and its room counted: before any tensor is read, and by what is really written."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import CONVERSIONS, words_of
from crash_driver import files_of, held_by, lay
from faults import PACKED, entries
from stage_support import LEFT, SET_ASIDE, lay_left, locked
from support import Outcome, Tensors, copy, edit, run_mopt

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.build import space
from modelopt_convert.stage.directory import StagingDir

SLACK = 64 << 10  # what the proof may say of each module, at its longest, is not what it says
Words = list[str | Path]


@pytest.fixture(
    params=["one file", "shards", "fp8", "uncalibrated", "two transformers", "nibbles", "scales", *CONVERSIONS]
)
def words(request: pytest.FixtureRequest, exports: Path, tmp_path: Path) -> Words:
    """A command line of each kind, without OUT."""
    base, nvfp4 = exports / "base", exports / "nvfp4"
    build: Words = ["build-nvfp4", "--preset", "flux1-dev", "--base", base, "--output", tmp_path / "room" / "out"]
    if request.param == "one file":
        return [*build, "--export", nvfp4]
    if request.param == "shards":
        return [*build, "--export", nvfp4, "--max-shard-size", "100kB"]
    if request.param == "fp8":
        return ["convert-fp8", *build[1:], "--export", exports / "fp8"]
    if request.param == "uncalibrated":
        return build
    if request.param == "two transformers":
        families: Path = request.getfixturevalue("families")
        pipelines = {name: tmp_path / name for name in ("base", "nvfp4")}
        for name, path in pipelines.items():
            for component in ("transformer", "transformer_2"):
                copy(families / "wan" / name, path / component)
            (path / "model_index.json").write_text("{}")
        both: Words = ["--export", pipelines["nvfp4"], "--base", pipelines["base"]]
        return ["build-nvfp4", "--preset", "none", *both, "--output", tmp_path / "room" / "out"]
    if request.param in CONVERSIONS:
        return [*words_of(request.param, {"nvfp4": nvfp4, "out": tmp_path / "room" / "out"})]
    command = {"nibbles": "swap-nibbles", "scales": "unswizzle-scales"}[request.param]
    return [command, nvfp4 / "transformer", tmp_path / "room" / "out", *(["--reverse"] * (command != "swap-nibbles"))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were read."""
    names: list[str] = []
    original = CheckpointReader.read_range

    def read_range(self: CheckpointReader, name: str, begin: int, num_bytes: int) -> bytes:
        names.append(name)
        return original(self, name, begin, num_bytes)

    monkeypatch.setattr(CheckpointReader, "read_range", read_range)
    return names


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many bytes room was asked."""
    found: list[int] = []
    original = StagingDir.check_space

    def check_space(self: StagingDir, num_bytes: int) -> None:
        found.append(num_bytes)
        original(self, num_bytes)

    monkeypatch.setattr(StagingDir, "check_space", check_space)
    return found


def taken(folder: Path) -> int:
    """What a checkpoint takes of the disk, in blocks as the file system counts them."""
    paths = [folder, *folder.rglob("*")]
    return sum(4096 if path.is_dir() else -(-path.stat().st_size // 4096) * 4096 for path in paths)


def test_the_room_is_counted_before_tensors_are_read(
    words: Words, room: Path, reads: list[str], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_mopt(*words, "--overwrite")
    assert done.exit_code == 0, done.stderr
    need, size = max(asked), taken(room / "out")
    rewritten = words[0] in ("swap-nibbles", "unswizzle-scales")
    assert size <= need <= size + (0 if rewritten or words[0] == "convert" else SLACK)
    before = entries(room)
    reads.clear()
    full = SimpleNamespace(f_bavail=need - 1, f_frsize=1, f_blocks=10**9, f_bfree=10**9)
    monkeypatch.setattr(os, "statvfs", lambda _path: full)
    refused = run_mopt(*words, "--overwrite")
    assert (refused.exit_code, refused.error_code) == (5, "storage.no_space"), refused.stderr
    assert str(need) in refused.message and str(need - 1) in refused.message
    assert entries(room) == before
    # What a rewrite has to write is known only when the modules were looked at.
    assert bool(reads) == rewritten
    full.f_bavail = need
    assert run_mopt(*words, "--overwrite").exit_code == 0


def test_headers_count_too(tmp_path: Path) -> None:
    """A header of a million names has 70 MB and more."""
    from modelopt_convert.checkpoint.header import TensorSpec, build_header
    from modelopt_convert.plan.plan import ShardPlan

    specs = tuple(TensorSpec(f"blocks.{number}.weight", "U8", (1,)) for number in range(10_000))
    [size] = space.shard_sizes([ShardPlan("one.safetensors", specs)])
    assert size == 10_000 + len(build_header(specs, {"format": "pt"})[0]) > 60 * 10_000
    assert space.disk_bytes([size], folders=0) % 4096 == 0 and 0 <= space.disk_bytes([size], folders=0) - size < 4096
    assert space.disk_bytes([1, 4096, 0]) == 3 * 4096


def test_busy_is_said_before_tensors_are_read(words: Words, room: Path, reads: list[str]) -> None:
    lay(room / "out", "old"), lay(room / LEFT, "another")
    before = entries(room)
    with locked(room / LEFT):
        refused = run_mopt(*words, "--overwrite")
    assert (refused.exit_code, refused.error_code) == (4, "output.busy"), refused.stderr
    assert entries(room) == before and reads == []


def test_a_dry_run_makes_nothing_and_recovers_nothing(words: Words, room: Path) -> None:
    lay(room / SET_ASIDE, "old"), lay(room / LEFT, "another")
    before = entries(room)
    with locked(room / LEFT):
        planned = run_mopt(*words, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert entries(room) == before


def of_another_model(export: Path, target: Path) -> Path:
    def change(tensors: Tensors) -> None:
        tensors[f"{PACKED}.weight"][0] = 0

    return edit(export, target, change)


def test_a_failed_proof_leaves_nothing_but_what_it_recovered(exports: Path, tmp_path: Path, room: Path) -> None:
    export = of_another_model(exports / "nvfp4", tmp_path / "export")

    def build() -> Outcome:
        flags: Words = ["--export", export, "--base", exports / "base", "--output", room / "out", "--overwrite"]
        return run_mopt("build-nvfp4", "--preset", "flux1-dev", *flags)

    failed = build()
    assert (failed.exit_code, failed.error_code) == (1, "check.proof")
    assert list(room.iterdir()) == []
    lay_left(room / SET_ASIDE, "old")
    assert build().exit_code == 1
    assert [path.name for path in room.iterdir()] == ["out"] and held_by(room / "out") == files_of("old")
    shutil.rmtree(room / "out")
    assert build().exit_code == 1 and list(room.iterdir()) == []


def test_a_refused_rewrite_leaves_nothing(exports: Path, room: Path) -> None:
    source = exports / "nvfp4" / "transformer"
    refused = run_mopt("swap-nibbles", source, room / "out", "--base", exports / "base")
    assert (refused.exit_code, refused.error_code) == (1, "check.already_in_order")
    assert list(room.iterdir()) == []
