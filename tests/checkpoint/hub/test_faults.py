"""What can go wrong on the way from the Hub: mended where it can be, else one line, and nothing is left behind."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_support import hub_environment
from loopback_hub import LoopbackHub, Request
from support import Outcome, run_mopt, tree

from modelopt_convert.checkpoint.location import parse_location
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import InputError, MoptError, RemoteError

NOW = {"Retry-After": "0"}


@pytest.fixture
def filled(hub: LoopbackHub, base: Path, no_pauses: None) -> LoopbackHub:
    hub.seed("alice/base", base)
    return hub


def everything(location: str = "hf://alice/base/transformer") -> dict[str, bytes]:
    with CheckpointReader(parse_location(location)) as reader:
        reader.prefetch((name, 0, info.num_bytes) for name, info in reader.tensors.items())
        return {name: reader.read(name) for name in reader.tensors}


@pytest.fixture
def wanted(base: Path) -> dict[str, bytes]:
    with CheckpointReader(base / "transformer") as reader:
        return {name: reader.read(name) for name in reader.tensors}


def inspect(location: str = "hf://alice/base") -> Outcome:
    return run_mopt("inspect", location)


def failed(one: Request) -> bool:
    """Whether a request was refused, or answered with less than the range it asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", one.range or "")
    return one.status >= 400 or (asked is not None and one.num_out <= int(asked[2]) - int(asked[1]))


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.fault("/_cdn/", status=503, times=3),
        lambda hub: hub.fault("/_cdn/", status=429, times=2, headers=NOW),
        lambda hub: hub.fault("/_cdn/", cut=5, times=3),
        lambda hub: hub.fault("/_cdn/", kind="short", times=3),
        lambda hub: hub.fault("/resolve/", status=503, times=3),
        lambda hub: hub.fault("/api/models/", status=500, times=3),
        lambda hub: hub.fault("/tree/", status=502, times=2),
        lambda hub: hub.fault("/_cdn/", status=403, times=1),
    ],
    ids=["503", "429", "cut", "short", "resolve 503", "info 500", "tree 502", "link 403"],
)
def test_what_passes_is_waited_out(
    fault: Callable[[LoopbackHub], None], filled: LoopbackHub, wanted: dict[str, bytes]
) -> None:
    fault(filled)
    filled.log.clear()
    assert everything() == wanted
    assert any(failed(one) for one in filled.log)  # the fault was met


def test_a_cut_connection_goes_on_where_it_was_cut(filled: LoopbackHub, wanted: dict[str, bytes]) -> None:
    filled.fault("/_cdn/.*00001-of", cut=500_000, times=4)  # two of them for the header, which is shorter
    filled.log.clear()
    assert everything() == wanted
    assert sum(one.num_out == 500_000 for one in filled.requests("/_cdn/.*00001-of")) == 2
    total = sum(map(len, wanted.values()))
    assert filled.bytes_out("/_cdn/") < total * 1.05 + 20_000


def test_expired_links_are_resolved_again(filled: LoopbackHub, wanted: dict[str, bytes]) -> None:
    with CheckpointReader(parse_location("hf://alice/base/transformer")) as reader:
        filled.expire_links()
        assert {name: reader.read(name) for name in reader.tensors} == wanted
    assert any(one.status == 403 for one in filled.requests("/_cdn/"))


@pytest.mark.parametrize(
    ("fault", "code", "exit_code"),
    [
        (lambda hub: hub.fault("/_cdn/", kind="ignore_range", times=99), "hub.range", 5),
        (lambda hub: hub.fault("/_cdn/", kind="wrong_range", times=99), "hub.range", 5),
        (lambda hub: hub.fault("/resolve/.*safetensors", kind="other_etag", times=99), "hub.changed", 3),
        (lambda hub: hub.fault("/_cdn/", status=503, times=99), "hub.cut", 5),
        (lambda hub: hub.fault("/_cdn/", status=403, times=99), "hub.cut", 5),
        (lambda hub: hub.fault("/_cdn/", cut=0, times=99), "hub.unreachable", 5),
        (lambda hub: hub.fault("/_cdn/", status=404, times=99), "hub.refused", 3),
        (lambda hub: hub.fault("/api/models/", status=503, times=99), "hub.server", 5),
        (lambda hub: hub.fault("/api/models/", status=429, times=99, headers=NOW), "hub.rate_limited", 5),
    ],
    ids=["ignored", "wrong", "etag", "503", "403", "cut", "404", "api 503", "api 429"],
)  # fmt: skip
def test_what_does_not_pass_is_one_line(
    fault: Callable[[LoopbackHub], None], code: str, exit_code: int, filled: LoopbackHub
) -> None:
    fault(filled)
    outcome = inspect()
    assert (outcome.exit_code, outcome.error_code) == (exit_code, code), outcome.stderr
    assert outcome.report is not None
    said = outcome.report["error"]
    assert "alice/base" in said["message"] and said["hint"] and "\n" not in said["message"] + said["hint"]


def as_reader(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def as_nobody(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def as_a_stranger(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


@pytest.mark.parametrize(
    ("who", "location", "code", "hint"),
    [
        (as_reader, "hf://alice/gated", "hub.gated", "accept its terms at http"),
        (as_nobody, "hf://alice/gated", "hub.gated", "hf auth login"),
        (as_reader, "hf://alice/private", "hub.no_repo", "hf auth whoami"),
        (as_nobody, "hf://alice/private", "hub.no_repo", "hf auth whoami"),
        (as_a_stranger, "hf://alice/gated", "hub.token", "hf auth"),
        (as_reader, "hf://alice/missing", "hub.no_repo", "check the name"),
        (as_reader, "hf://alice/base@nowhere", "hub.no_revision", "branches and tags"),
        (as_reader, "hf://alice/base/nothing", "input.missing", "hf://ORGANIZATION/NAME"),
        (as_reader, "hf://alice/base/nothing.safetensors", "input.missing", "hf://ORGANIZATION/NAME"),
    ],
)
def test_access(
    who: Callable[[LoopbackHub, pytest.MonkeyPatch], None],
    location: str,
    code: str,
    hint: str,
    filled: LoopbackHub,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled.seed("alice/gated", base, gated=True)
    filled.seed("alice/private", base, private=True)
    who(filled, monkeypatch)
    outcome = inspect(location)
    assert (outcome.exit_code, outcome.error_code) == (3, code), outcome.stderr
    assert hint in outcome.message and location.partition("@")[0] in outcome.message


@pytest.mark.parametrize(
    "text", ["hf://", "hf://alice", "hf://datasets/a/b", "hf://a/b/../c", "hf://a/b@", "hf://buckets/a/b"]
)
def test_what_names_no_repo_is_a_usage_error(text: str) -> None:
    outcome = run_mopt("inspect", text)
    assert outcome.exit_code == 2 and "hf://ORGANIZATION/NAME" in outcome.stderr.replace("\n", " ")


def test_a_path_that_is_not_there_is_never_taken_for_a_repo(filled: LoopbackHub) -> None:
    filled.log.clear()
    outcome = inspect("alice/base")
    assert (outcome.exit_code, outcome.error_code) == (3, "input.missing")
    assert "hf://alice/base if the repo" in outcome.message and not filled.log


def test_a_failed_build_leaves_nothing(filled: LoopbackHub, nvfp4: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    filled.fault("/_cdn/.*00002-of", status=503, times=10_000)
    where = ("--export", nvfp4, "--base", "hf://alice/base", "--output", room / "out")
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", *where)
    assert (outcome.exit_code, outcome.error_code) == (5, "hub.cut")
    assert not list(room.iterdir())


def test_what_was_fetched_is_no_file_that_could_stay(filled: LoopbackHub, tmp_path: Path) -> None:
    assert everything()
    assert not [path for path in (tmp_path / "_home").rglob("*") if path.is_file()]


def test_a_full_disk_is_said_before_anything_is_fetched(filled: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs
    with CheckpointReader(parse_location("hf://alice/base/transformer")) as reader:
        full = [*real(0)]
        full[4] = 0  # f_bavail
        monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(full))
        filled.log.clear()
        with pytest.raises(RemoteError, match="are free beside the Hub's cache") as error:
            reader.read("proj_out.weight")
        assert error.value.code == "hub.disk_full" and not filled.log


def test_a_cache_that_cannot_be_written_is_named(
    filled: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_home").mkdir(exist_ok=True)
    (tmp_path / "_home" / "assets").write_text("a file")
    with pytest.raises(MoptError, match="cannot be stored") as error:
        everything()
    assert error.value.code == "storage.spool" and str(tmp_path) in error.value.message


def test_one_file_failing_is_not_another_failing(filled: LoopbackHub, wanted: dict[str, bytes]) -> None:
    filled.fault("/_cdn/.*00003-of", kind="ignore_range", times=99)
    with pytest.raises(RemoteError) as error:
        everything()
    assert "00003-of" in error.value.message
    with pytest.raises(InputError, match="no such file"):
        parse_location("hf://alice/base/x.pt").repo.fetch("x.pt")  # type: ignore[union-attr]


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_network(variables: dict[str, str], filled: LoopbackHub, base: Path, tmp_path: Path) -> None:
    """In a process of its own: the client reads both variables once. What is in the cache serves offline."""
    environment = hub_environment(filled) | variables
    code = (
        "from modelopt_convert.checkpoint.hub import client; client.PAUSES_S = (0.0,); "
        "import modelopt_convert.cli as c; c.main()"
    )

    def mopt(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment | more)

    outcome = mopt("inspect", "hf://alice/base")
    offline = "HF_HUB_OFFLINE" in variables
    assert outcome.returncode == (3 if offline else 5)
    assert ("[hub.not_cached]" if offline else "[hub.unreachable]") in outcome.stderr
    assert "HF_HUB_OFFLINE" in outcome.stderr
    if offline:
        online = mopt("inspect", "hf://alice/base", "--download", HF_HUB_OFFLINE="0")
        assert online.returncode == 0, online.stderr
        filled.log.clear()
        cached = mopt("inspect", "hf://alice/base")
        assert cached.returncode == 0 and cached.stdout == online.stdout and not filled.log


def test_download_fills_the_cache_and_the_cache_serves(filled: LoopbackHub, tmp_path: Path, base: Path) -> None:
    cache = tmp_path / "_home" / "hub" / "models--alice--base" / "snapshots" / filled.head("alice/base")
    assert run_mopt("inspect", "hf://alice/base", "--download").exit_code == 0
    local = tree(base / "transformer")
    assert {name: digest for name, digest in tree(cache / "transformer").items()} == local
    filled.log.clear()
    assert inspect().exit_code == 0
    assert not filled.requests("/_cdn/") and not filled.requests("/resolve/")
