"""mopt push that is killed, cut off, refused or overtaken: what stands then, and what the next run sends."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_support import hub_environment
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from push_support import REPO, contents, copy_of, flip_bias, lfs_bytes, published, push, shards_of

from modelopt_convert.checkpoint.hub.client import hub_errors
from modelopt_convert.commands.push import command as module
from modelopt_convert.run.errors import InputError, RemoteError

MAIN = "from modelopt_convert.cli import main; main()"


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("done", [1, 3])
def test_killed_and_run_again_only_what_is_missing_is_sent(hub: LoopbackHub, built: Path, done: int) -> None:
    """The next shard's transfer hangs when the process is killed."""
    shards = shards_of(built)
    hangs = f"/_lfs/{sha256(shards[done])}"
    hub.fault(hangs, method="PUT", stall=2, status=500)
    command = [sys.executable, "-c", MAIN, "push", str(built), REPO, "-q"]
    environment = hub_environment(hub)
    with subprocess.Popen(command, env=environment) as process:
        wait_for(lambda: len(hub.requests(hangs)) > 0)
        process.kill()
    assert process.returncode == -9 and published(hub) == {} and len(hub.commits(REPO)) == 1
    before = lfs_bytes(hub)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    missing = sum(shard.stat().st_size for shard in shards[done:])
    assert lfs_bytes(hub) - before == missing
    assert published(hub) == contents(built) and len(hub.commits(REPO)) == 2


def test_killed_with_xet_only_unregistered_shards_are_sent_again(xet_hub: LoopbackHub, built: Path) -> None:
    trusting = f"from modelopt_convert.checkpoint.hub import answers; answers.TRUSTED = ({xet_hub.url!r},); {MAIN}"
    command = [sys.executable, "-c", trusting, "push", str(built), REPO, "-q"]
    environment = hub_environment(xet_hub)
    with subprocess.Popen(command, env=environment) as process:
        wait_for(lambda: len(xet_hub.requests("/v1/shards")) >= 2)
        process.kill()
    assert process.returncode == -9 and published(xet_hub) == {}
    time.sleep(0.2)
    # The last one that was asked for may never have been told that it was done.
    done, sent = len(xet_hub.requests("/v1/shards")) - 1, xet_hub.bytes_in("/xorbs/")
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    missing = sum(shard.stat().st_size for shard in shards_of(built)[done:])
    assert xet_hub.bytes_in("/xorbs/") - sent <= missing * 1.02 + 1000
    assert published(xet_hub) == contents(built)


def test_servers_that_are_busy_are_asked_again(hub: LoopbackHub, built: Path) -> None:
    hub.fault("/_lfs/", method="PUT", status=503, times=3)
    assert push(built).exit_code == 0
    assert published(hub) == contents(built)


def test_the_client_says_nothing_of_its_own(hub: LoopbackHub, built: Path) -> None:
    hub.fault("/_lfs/", method="PUT", status=503)
    command = [sys.executable, "-c", MAIN, "push", str(built), REPO, "-q"]
    done = subprocess.run(command, env=hub_environment(hub), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("match", "method", "fault", "code"),
    [
        ("/_lfs/", "PUT", {"status": 503, "times": 100}, "hub.server"),
        ("/lfs/objects/batch", "POST", {"status": 500, "times": 100}, "hub.server"),
        ("/commit/main", "POST", {"status": 504}, "hub.server"),
        ("/commit/main", "POST", {"cut": 10}, "hub.unreachable"),
        ("/preupload/", "POST", {"status": 429, "times": 100}, "hub.rate_limited"),
        ("/whoami", "GET", {"status": 429, "times": 100}, "hub.rate_limited"),
        ("/tree/", "GET", {"cut": 20, "times": 100}, "hub.unreachable"),
    ],
)
def test_what_may_work_later_is_exit_5_and_works_later(
    hub: LoopbackHub, built: Path, match: str, method: str, fault: dict[str, int], code: str
) -> None:
    hub.fault(match, method=method, **fault)  # type: ignore[arg-type]
    outcome = push(built)
    assert (outcome.exit_code, outcome.error_code) == (5, code), outcome.stderr
    assert f"mopt push {built} {REPO}" in outcome.message
    if REPO in hub.store.repos and "cut" not in fault:
        assert published(hub) == {}
    hub.reset(hub.root.parent / "later")
    assert push(built).exit_code == 0 and published(hub) == contents(built)


def test_a_commit_in_between_is_not_overwritten(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.md").write_text("somebody's")
    seen = module.list_files

    def overtaken(*arguments: object) -> object:
        found = seen(*arguments)  # type: ignore[arg-type]
        hub.seed(REPO, other)
        return found

    monkeypatch.setattr(module, "list_files", overtaken)
    outcome = push(built)
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.stale_parent")
    assert f"mopt push {built} {REPO}" in outcome.message
    assert published(hub) == {"notes.md": b"somebody's"}


def test_offline_is_said_at_once(hub: LoopbackHub, built: Path) -> None:
    command = [sys.executable, "-c", MAIN, "push", str(built), REPO]
    result = subprocess.run(command, env=hub_environment(hub) | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert result.returncode == 3 and "[hub.offline]" in result.stderr and "unset it" in result.stderr
    assert hub.log == []


def test_a_hub_that_is_not_there(hub: LoopbackHub, built: Path) -> None:
    command = [sys.executable, "-c", MAIN, "push", str(built), REPO]
    result = subprocess.run(
        command, env=hub_environment(hub) | {"HF_ENDPOINT": "http://127.0.0.1:1"}, capture_output=True, text=True
    )
    assert result.returncode == 5 and "[hub.unreachable]" in result.stderr and "mopt push" in result.stderr


def test_a_shard_that_changes_while_it_is_sent_is_not_committed(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(built, tmp_path / "out")
    seen = module.list_files

    def meanwhile(*arguments: object) -> object:
        flip_bias(folder)
        return seen(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "list_files", meanwhile)
    outcome = push(folder)
    assert (outcome.exit_code, outcome.error_code) == (3, "input.changed") and published(hub) == {}


def test_a_folder_that_takes_its_place_meanwhile_is_not_committed(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build with --overwrite leaves it: the verified files are unchanged, and bear other names."""
    folder, other = copy_of(built, tmp_path / "out"), copy_of(built, tmp_path / "other")
    flip_bias(other)
    seen = module.list_files

    def meanwhile(*arguments: object) -> object:
        folder.rename(tmp_path / "before")
        other.rename(folder)
        return seen(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "list_files", meanwhile)
    outcome = push(folder)
    assert (outcome.exit_code, outcome.error_code) == (3, "input.changed") and published(hub) == {}


def test_a_full_disk_and_what_xet_says(hub: LoopbackHub) -> None:
    for raised, code in (
        (OSError(28, "No space left on device"), "hub.disk_full"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), "hub.disk_full"),
        (RuntimeError("CAS Client Error"), "hub.transfer"),
    ):
        with pytest.raises(RemoteError) as caught, hub_errors(REPO, "run it again"):
            raise raised
        assert caught.value.code == code and caught.value.hint


def test_a_bug_of_ours_is_not_the_hubs(hub: LoopbackHub) -> None:
    with pytest.raises(ValueError, match="ours"), hub_errors(REPO):
        raise ValueError("ours")
    with pytest.raises(InputError) as caught, hub_errors(REPO):
        HfApi().create_repo(REPO, repo_type="nonsense")
    assert caught.value.code == "hub.refused"
