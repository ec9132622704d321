"""Shards as tasks of a real Ray cluster, on this machine: the same output as on threads, whatever befalls a worker."""

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import PACKED
from root import ROOT
from stage_support import copy_of_left
from support import build, config_of, edit, load, run_mopt, tree

from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows

# A check of Ray's own, in its C++, which ends the process now and then on a machine that is busy.
RAY_GAVE_UP = "An unexpected system state has occurred"
SMALL = ("--max-shard-size", "400kB")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster, and the environment in which it is found."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path, for its sockets
        environment = os.environ | {
            "HOME": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "ray_cluster.py"), folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 120)[0], "no cluster after two minutes"
            yield environment | {"RAY_ADDRESS": process.stdout.readline().strip()}
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            finally:
                process.kill()
                process.stdout.close()


def driver(*words: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "support" / "ray_driver.py"), *map(str, words)]


def inputs(exports: Path) -> tuple[str, ...]:
    return "--preset", "flux1-dev", "--export", str(exports / "nvfp4"), "--base", str(exports / "base")


def test_a_killed_worker_changes_nothing(exports: Path, room: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    assert build(exports / "nvfp4", exports / "base", room / "threads", *SMALL).exit_code == 0
    assert len(list((room / "threads").glob("*.safetensors"))) > 5
    words = ("build-nvfp4", *inputs(exports), *SMALL, "--output", room / "ray", "--executor", "ray", "--json")
    done = subprocess.run(driver("killed_once", tmp_path, *words), env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, size = (tmp_path / "killed").read_text().splitlines()
    assert Path(path).parent.parent.name.startswith(".ray.mopt-stage-") and int(size) > 0
    assert tree(room / "ray") == tree(room / "threads")
    assert sorted(one.name for one in room.iterdir()) == ["ray", "threads"]
    assert json.loads(done.stdout)["status"] == "ok" and done.stdout.count("\n") == 1


def test_other_commands_and_what_goes_wrong(
    exports: Path, room: Path, cluster: dict[str, str], tmp_path: Path, old: Path, good: Path
) -> None:
    base, out = exports / "base", room / "out"
    quantize = ["build-nvfp4", "--preset", "flux1-dev", "--base", base, *SMALL]
    cast = ["convert-fp8", "--preset", "flux1-dev", "--export", old, "--checkpoint", good, "--base", base, *SMALL]
    equal = {"quantize": quantize, "cast": cast, "swap": ["swap-nibbles", exports / "nvfp4_sharded" / "transformer"]}
    # One file under native names, which fuses modules: read by recipes.
    assert run_mopt("convert", base, tmp_path / "native", "--to", "comfyui").exit_code == 0
    (native,) = (tmp_path / "native").glob("*.safetensors")
    equal["native"] = ["build-nvfp4", "--preset", "flux1-dev", "--export", exports / "nvfp4", "--base", native, *SMALL]
    for name, words in equal.items():
        where = [room / f"{name}-threads"] if name == "swap" else ["--output", room / f"{name}-threads"]
        assert run_mopt(*words, *where).exit_code == 0
    touched = sorted((base / "transformer").glob("*.safetensors"))[0]
    copied = tmp_path / "base"
    subprocess.run(["cp", "-r", base, copied], check=True)
    faults = {
        # What is planted: exit code, code, and what the message names.
        f"touched {copied / 'transformer' / touched.name}": (3, "input.changed", touched.name),
        "other_version": (5, "executor.version", "0.0.0"),
        "without_mopt": (5, "executor.version", "modelopt_convert"),
        "unseen": (5, "executor.shared_filesystem", "stage"),
        "lost": (5, "executor.shared_filesystem", "here are none"),
        "full": (5, "storage.no_space", "there"),
        "killed_always": (5, "executor.lost", "diffusion_pytorch_model"),
        "buggy": (70, "internal", "ZeroDivisionError: there"),
        "no_cluster": (5, "executor.no_cluster", "RAY_ADDRESS"),
    }
    failing = ["build-nvfp4", "--preset", "flux1-dev", "--base", copied, *SMALL, "--output", out]
    jobs = [["none", [*words, *([] if name == "swap" else ["--output"]), room / name]] for name, words in equal.items()]
    jobs += [[fault, failing] for fault in faults]
    # What a task finds of a module is judged here, before anything is published.
    rows = load(exports / "nvfp4" / "transformer")[f"{PACKED}.weight"].shape[0]
    row = next(row for row in range(rows - 1, 0, -1) if row not in sample_rows(rows, SAMPLED_ROWS))
    damaged = edit(
        exports / "nvfp4", tmp_path / "damaged", lambda all_: all_[f"{PACKED}.weight"][row, 3].bitwise_xor_(2)
    )
    faults["damaged"] = (1, "check.proof", f"{PACKED} (row {row}, column 6")
    words = ["build-nvfp4", "--preset", "flux1-dev", "--export", damaged, "--base", base, *SMALL, "--output", out]
    jobs.append(["none", words])
    lines = [[fault, str(tmp_path), [*map(str, words), "--executor", "ray"]] for fault, words in jobs]
    for _ in range(3):
        done = subprocess.run(driver("batch"), env=cluster, input=json.dumps(lines), capture_output=True, text=True)
        if RAY_GAVE_UP not in done.stderr:
            break
        for one in room.iterdir():
            if not one.name.endswith("-threads"):
                shutil.rmtree(one) if one.is_dir() else one.unlink()
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for name, (exit_code, _, stderr) in zip(equal, outcomes, strict=False):
        assert exit_code == 0, (name, stderr)
        assert tree(room / name) == tree(room / f"{name}-threads")
        assert config_of(room / name)
    for (fault, (exit_code, code, named)), outcome in zip(faults.items(), outcomes[len(equal) :], strict=True):
        assert outcome[0] == exit_code, (fault, outcome)
        report = json.loads(outcome[1])
        assert report["error"]["code"] == code, fault
        assert named in report["error"]["message"] + str(report["error"]["hint"]), (fault, report["error"])
        assert "Traceback" not in outcome[1] + outcome[2]
    assert sorted(one.name for one in room.iterdir()) == sorted(
        f"{name}{end}" for name in equal for end in ("", "-threads")
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_tasks_and_removes_the_stage(
    exports: Path, room: Path, cluster: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    words = ("build-nvfp4", *inputs(exports), *SMALL, "--output", room / "out", "--executor", "ray")
    with subprocess.Popen(driver("endless", tmp_path, *words), env=cluster, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("begun-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(300) == 128 + number
    assert list(room.iterdir()) == []
    pids = [one.name.removeprefix("begun-") for one in tmp_path.glob("begun-*")]
    while not all((tmp_path / f"ended-{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)  # on a busy machine a worker may be late to say so
    # Nobody writes into a stage that is being removed.
    assert {pid: (tmp_path / f"ended-{pid}").read_text() for pid in pids} == dict.fromkeys(pids, "True")


def test_what_a_killed_run_left_on_a_cluster_is_swept(
    exports: Path, room: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    """With the folder of attempts, which no other executor makes; by a run on either executor."""
    words = ("build-nvfp4", *inputs(exports), *SMALL, "--json")
    killed = driver("endless", tmp_path, *words, "--output", room / "out", "--executor", "ray")
    process = subprocess.Popen(killed, env=cluster)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("begun-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    [mark, stage] = sorted(one.name for one in room.iterdir())
    assert mark.startswith(".out.mopt-mark-") and (room / stage / "attempts").is_dir()
    for executor, where in {"threads": copy_of_left(room, tmp_path / "again"), "ray": room}.items():
        again = [sys.executable, "-m", "modelopt_convert", *map(str, words), "--executor", executor]
        done = subprocess.run([*again, "--output", where / "out"], env=cluster, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [one for one in json.loads(done.stdout)["warnings"] if one["code"].startswith("output.")] == []
        assert [one.name for one in where.iterdir()] == ["out"]
