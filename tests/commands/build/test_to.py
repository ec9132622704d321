"""A build ``--to`` another dialect: the files of a build and a conversion of it, in one run, or nothing."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import load, run_mopt, same_bits

from modelopt_convert.commands.build import to as to_step
from modelopt_convert.stage.directory import StagingDir

NVFP4, FP8 = "build-nvfp4", "convert-fp8"


def made(families: Path, family: str, command: str, out: Path, *more: str | Path) -> Any:
    algorithm = "nvfp4" if command == NVFP4 else "fp8"
    given = ("--export", families / family / algorithm, "--base", families / family / "base", "--verify", "off")
    return run_mopt(command, *given, "--output", out, *more)


@pytest.mark.parametrize(
    ("family", "command", "to"),
    [
        ("wan", NVFP4, "comfyui"),
        ("qwen_image", NVFP4, "comfyui"),
        ("flux2", NVFP4, "comfyui"),
        ("wan", FP8, "comfyui"),
        ("qwen_image", FP8, "comfyui"),
        ("wan", NVFP4, "torchao"),
        ("qwen_image", FP8, "torchao"),
        ("qwen_image", NVFP4, "compressed-tensors"),
        ("wan", NVFP4, "bf16"),
    ],
)
def test_it_is_the_build_converted(families: Path, tmp_path: Path, family: str, command: str, to: str) -> None:
    (tmp_path / "parent").mkdir()
    one = made(families, family, command, tmp_path / "parent" / "out", "--preset", "none", "--to", to)
    assert one.exit_code == 0 and one.report is not None, one.stderr
    assert [place.name for place in (tmp_path / "parent").iterdir()] == ["out"]
    known = ("--preset", "none", "--allow-known-broken")
    assert made(families, family, command, tmp_path / "built", *known).exit_code == 0
    assert run_mopt("convert", tmp_path / "built", tmp_path / "two", "--to", to).exit_code == 0
    files = {place.name for place in (tmp_path / "two").iterdir()} - {"mopt.json"}
    assert {place.name for place in (tmp_path / "parent" / "out").iterdir()} - {"mopt.json", "README.md"} == files
    for name in files:
        assert (tmp_path / "parent" / "out" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    told = one.report["convert"]
    assert told["proven"] and told["proof"]["compared"] == told["proof"]["equal"] > 0
    assert one.report["proof"]["status"] == "pass" and one.report["output"]["published"]
    assert {shard["file"] for shard in one.report["output"]["shards"]} <= files
    record = json.loads((tmp_path / "parent" / "out" / "mopt.json").read_text())
    built = json.loads((tmp_path / "built" / "mopt.json").read_text())
    assert record["command"] == command and record["proof"] == built["proof"]
    assert record["sources"] == built["sources"] and record["converted"]["from"] == "modelopt"


@pytest.mark.parametrize("command", [NVFP4, FP8])
def test_it_is_proven_again_and_goes_back(families: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    assert made(families, "wan", command, out, "--preset", "none", "--to", "comfyui").exit_code == 0
    again = run_mopt("verify", out, "--base", families / "wan" / "base", "--device", "cpu")
    assert again.exit_code == 0 and again.report is not None, again.stderr
    assert "proven" in again.report["verify"]["statement"], again.report["verify"]
    assert "models/diffusion_models" in (out / "README.md").read_text()
    assert run_mopt("convert", out, tmp_path / "back", "--to", "modelopt").exit_code == 0
    known = ("--preset", "none", "--allow-known-broken")
    assert made(families, "wan", command, tmp_path / "built", *known).exit_code == 0
    before, after = load(tmp_path / "built"), load(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)


def test_what_a_preset_makes_unequal_is_told_before_it_is_written(families: Path, tmp_path: Path) -> None:
    asked = ("--preset", "flux1-dev", "--to", "comfyui")
    for dry in ((), ("--dry-run",)):
        refused = made(families, "flux1", NVFP4, tmp_path / "out", *asked, *dry)
        assert refused.exit_code == 3 and "[convert.inexact]" in refused.stderr, refused.stderr
        assert "single_blocks.0.linear1: single_transformer_blocks.0.proj_mlp is not quantized" in refused.stderr
        assert "bytes more for 6 quantized modules" in refused.stderr
        assert list(tmp_path.iterdir()) == []
    planned = made(families, "flux1", NVFP4, tmp_path / "out", *asked, "--inexact", "bf16", "--dry-run")
    assert planned.exit_code == 0 and planned.report is not None and list(tmp_path.iterdir()) == []
    (cost,) = [one["message"] for one in planned.report["warnings"] if one["code"] == "convert.bf16"]
    done = made(families, "flux1", NVFP4, tmp_path / "out", *asked, "--inexact", "bf16")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert cost in [one["message"] for one in done.report["warnings"]]
    lossy = done.report["convert"]["lossy"]
    assert [one["module"] for one in lossy] == ["single_blocks.0.linear1", "single_blocks.1.linear1"]
    assert done.report["convert"]["modules"] == {
        "exact": 18,
        "rounded_global": 0,
        "bf16": 6,
        "rebased": 0,
        "requantized": 0,
    }
    # The cost is that of the files: what is packed without --to, against what the target has.
    assert made(families, "flux1", NVFP4, tmp_path / "built", "--preset", "flux1-dev").exit_code == 0
    packed, base = load(tmp_path / "built"), load(families / "flux1" / "base" / "transformer")
    names = [f"single_transformer_blocks.{n}.attn.to_{one}" for n in (0, 1) for one in "qkv"]
    now = sum(
        tensor.nbytes for name, tensor in packed.items() if name.rpartition(".")[0] in names and "bias" not in name
    )
    assert f": {sum(base[f'{name}.weight'].nbytes for name in names) - now} bytes more" in cost
    written = load(tmp_path / "out")
    parts = [
        base[f"single_transformer_blocks.0.{one}.weight"] for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    start = 0
    for part in parts:  # the base's own values, not those that the packed weights decode to
        assert same_bits(written["single_blocks.0.linear1.weight"][start : start + part.shape[0]], part)
        start += part.shape[0]
    assert "2 modules are in BF16 here" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("more", [(), ("--inexact", "bf16")])
def test_a_base_alone_becomes_a_file_of_comfyui(families: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    base = families / "flux1" / "base"
    asked = ("--preset", "flux1-dev", "--base", base, "--verify", "off")
    one = run_mopt(NVFP4, *asked, "--output", tmp_path / "out", "--to", "comfyui", *more)
    if not more:
        assert one.exit_code == 3 and "[convert.inexact]" in one.stderr
        return
    assert one.exit_code == 0 and one.report is not None, one.stderr
    assert one.report["convert"]["modules"]["exact"] == 18  # q, k, v of a block share their scale
    assert {one["module"] for one in one.report["convert"]["lossy"]} == {
        "single_blocks.0.linear1",
        "single_blocks.1.linear1",
    }


def test_what_cannot_be_meant_is_one_line(families: Path, tmp_path: Path) -> None:
    for more, word in [
        (("--to", "comfyui", "--pipeline-output"), "--pipeline-output"),
        (("--to", "comfyui", "--push-to", "a/b"), "--push-to"),
        (("--inexact", "bf16"), "--inexact"),
    ]:
        refused = made(families, "wan", NVFP4, tmp_path / "out", "--preset", "none", *more)
        assert refused.exit_code == 2 and word in refused.stderr, refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_old_checkpoint_stands_until_the_new_is_whole(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--preset", "none", "--to", "comfyui")
    out = tmp_path / "out"
    assert made(families, "wan", FP8, out, *asked).exit_code == 0
    before = {place.name: place.read_bytes() for place in out.iterdir()}
    refused = made(families, "wan", NVFP4, out, *asked)
    assert refused.exit_code == 4 and "--overwrite" in refused.stderr, refused.stderr
    real = to_step.stream_converted

    def damaged(stage: StagingDir, *rest: Any) -> Any:
        done = real(stage, *rest)
        (file,) = stage.path.glob("*.safetensors")
        with file.open("r+b") as opened:  # a planted fault
            opened.seek(-1, os.SEEK_END)
            last = opened.read(1)
            opened.seek(-1, os.SEEK_END)
            opened.write(bytes([last[0] ^ 1]))
        return done

    monkeypatch.setattr(to_step, "stream_converted", damaged)
    refused = made(families, "wan", NVFP4, out, *asked, "--overwrite")
    assert refused.exit_code == 1 and "[check.converted]" in refused.stderr, refused.stderr
    monkeypatch.undo()
    assert {place.name: place.read_bytes() for place in out.iterdir()} == before
    assert [place.name for place in tmp_path.iterdir()] == ["out"]
    assert made(families, "wan", NVFP4, out, *asked, "--overwrite").exit_code == 0
    assert [place.name for place in out.glob("*.safetensors")] == ["wan-nvfp4.safetensors"]
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["convert_staged", "stream_converted", "read_back", "remove_folder"])
def test_a_kill_in_between_leaves_nothing_that_the_next_run_does_not_sweep(
    families: Path, tmp_path: Path, moment: str
) -> None:
    script = f"""
import os, signal, sys
from importlib import import_module
import modelopt_convert.commands.build.to as to
import modelopt_convert.commands.build.command as command
from modelopt_convert.stage.directory import StagingDir
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
for one in {("StagingDir",) if moment == "remove_folder" else ("to", "command")}:
    if hasattr(eval(one), {moment!r}): setattr(eval(one), {moment!r}, die)
from modelopt_convert.cli import main
sys.argv[0] = "mopt"
main()
"""
    given = ("--export", families / "wan" / "nvfp4", "--base", families / "wan" / "base", "--verify", "off")
    words = [NVFP4, "--preset", "none", *map(str, given), "--output", str(tmp_path / "out"), "--to", "comfyui"]
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) != []
    # Any run to OUT sweeps it, also one without --to.
    assert made(families, "wan", NVFP4, tmp_path / "out", "--preset", "none").exit_code == 0
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_of_two_transformers_one_is_named(families: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("transformer", "transformer_2"):
        shutil.copytree(families / "flux1" / "base" / "transformer", base / name)
    asked = (NVFP4, "--preset", "flux1-dev", "--base", base, "--output", tmp_path / "out", "--dry-run")
    refused = run_mopt(*asked, "--to", "torchao")
    assert refused.exit_code == 2 and "--component says which" in refused.stderr, refused.stderr
    planned = run_mopt(*asked, "--to", "torchao", "--component", "transformer_2")
    assert planned.exit_code == 0, planned.stderr


def test_what_the_hint_proposes_runs(exports: Path, built_nvfp4: Path, tmp_path: Path) -> None:
    """Of FLUX.1 the preset keeps a part of what ComfyUI fuses."""
    given = ("--preset", "flux1-dev", "--export", exports / "nvfp4", "--base", exports / "base")
    refused = run_mopt(NVFP4, *given, "--output", tmp_path / "out", "--to", "comfyui")
    assert refused.exit_code == 3 and refused.error_code == "convert.inexact", refused.stderr
    hint = refused.message.splitlines()[1]
    assert hint.startswith("--inexact bf16 writes these in BF16, ") and hint.count("`") == 2
    program, *words = shlex.split(hint.split("`")[1])
    shutil.copytree(built_nvfp4, tmp_path / "out")  # what the build without --to writes
    done = run_mopt(*words)
    assert program == "mopt" and done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "out-comfyui").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("to", ["modelopt", "torchao", "comfyui"])
def test_no_engine_is_told_of_that_is_not_asked_for(to: str, exports: Path, tmp_path: Path) -> None:
    words = (NVFP4, "--preset", "flux1-dev", "--base", exports / "base", "--output", tmp_path / "out", "--dry-run")
    outcome = run_mopt(*words, *([] if to == "modelopt" else ["--to", to, "--inexact", "bf16"]))
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    told = {one["code"] for one in outcome.report["warnings"]}
    assert "build.uncalibrated" in told and ("engine.dynamic_input_scale" in told) is (to == "modelopt")
    assert ("sglang" in outcome.stderr.lower()) is (to == "modelopt"), outcome.stderr


def test_what_the_target_cannot_hold_is_said_before_the_work(exports: Path, tmp_path: Path) -> None:
    words = (NVFP4, "--preset", "flux1-dev", "--base", exports / "base", "--output", tmp_path / "out")
    refused = run_mopt(*words, "--to", "bfl-diffusers", "--inexact", "bf16", "--dry-run")
    assert refused.exit_code == 3 and refused.error_code == "convert.no_input_scale", refused.stderr
    assert str(exports / "base" / "transformer") in refused.message and "--to torchao" in refused.message
