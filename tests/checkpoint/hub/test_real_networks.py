"""Inputs on the Hub under what real networks, caches and signals do to them."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_support import hub_environment
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from loopback_hub import LoopbackHub
from support import run_mopt

from modelopt_convert.checkpoint.hub import remote_file
from modelopt_convert.checkpoint.hub.answers import HubFile
from modelopt_convert.checkpoint.hub.client import hub_errors
from modelopt_convert.checkpoint.hub.range_source import Outage
from modelopt_convert.checkpoint.hub.ranges import Range, without
from modelopt_convert.checkpoint.hub.remote_file import RemoteFile
from modelopt_convert.checkpoint.location import parse_location
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import Interrupted, MoptError, RemoteError

SIGNED = "https://cdn.example/xorbs/ab?X-Amz-Signature=c0ffee&Expires=1"


@pytest.fixture
def filled(any_hub: LoopbackHub, base: Path, no_pauses: None) -> LoopbackHub:
    any_hub.seed("alice/base", base)
    return any_hub


def test_what_was_downloaded_is_read_wherever_the_cache_keeps_it(filled: LoopbackHub, tmp_path: Path) -> None:
    """Newer clients keep one copy of a Xet file for all repos, outside the folder of any."""
    assert run_mopt("inspect", "hf://alice/base", "--download").exit_code == 0
    filled.log.clear()
    outcome = run_mopt("inspect", "hf://alice/base")
    assert outcome.exit_code == 0 and not filled.requests("/_cdn/|/cas/"), outcome.stderr
    snapshot = tmp_path / "_home" / "hub" / "models--alice--base" / "snapshots" / filled.head("alice/base")
    assert run_mopt("inspect", snapshot).exit_code == 0


def test_another_total_is_another_file(filled: LoopbackHub) -> None:
    def read() -> bytes:
        with CheckpointReader(parse_location("hf://alice/base/transformer")) as reader:
            first = min(reader.tensors.values(), key=lambda info: (info.file, info.start))
            size = reader.num_bytes
            filled.fault("/_cdn/", times=99, headers={"Content-Range": f"bytes {first.start}-{first.start}/{size}"})
            return reader.read_range(first.name, 0, 1)

    with pytest.raises(RemoteError, match="asked for bytes") as caught:
        read()
    assert caught.value.code == "hub.range"


@pytest.mark.parametrize("status", [404, 416, 500])
def test_links_are_told_without_their_signature(status: int) -> None:
    """Whoever has it may read the file; messages and reports are passed on."""
    response = httpx.Response(status, request=httpx.Request("GET", SIGNED))
    with pytest.raises(MoptError) as caught, hub_errors("alice/base"):
        raise HfHubHTTPError(f"Client error '{status}' for url '{SIGNED}' (Request ID: x)", response=response)
    with pytest.raises(MoptError) as other, hub_errors("alice/base"):
        raise RuntimeError(f"Request error: sending request for url ({SIGNED})")
    for error in (caught.value, other.value):
        assert "c0ffee" not in error.message and "Expires" not in error.message
    assert "https://cdn.example/xorbs/ab" in other.value.message


def test_a_quota_is_a_full_disk() -> None:
    with pytest.raises(RemoteError) as caught, hub_errors("alice/base"):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert caught.value.code == "hub.disk_full"


class Zeros(RemoteFile):
    """A file that needs no network."""

    def _fetch(self, begin: int, end: int) -> bool:
        self._put(bytes(end - begin), begin)
        return True


def zeros(num_bytes: int, pool: ThreadPoolExecutor) -> RemoteFile:
    return Zeros("alice/base", "0" * 40, "x", HubFile(num_bytes, "", None), pool, Outage(), where="x").open()


@pytest.mark.usefixtures("hub")
def test_a_read_does_not_go_through_all_that_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def counted(ranges: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
        looked_at.append(len(taken))
        return without(ranges, taken)

    with ThreadPoolExecutor(1) as pool:
        file = zeros(1_000_000, pool)
        file.prefetch((at * 1000, at * 1000 + 8) for at in range(1000))
        monkeypatch.setattr(remote_file, "without", counted)
        for at in range(1000):
            assert file.read(at * 1000, 8) == bytes(8)
        file.close()
    assert max(looked_at) <= 2


@pytest.mark.usefixtures("hub")
def test_a_signal_while_ranges_are_asked_for_is_a_signal_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        file = zeros(100_000, pool)
        submit = pool.submit
        times = iter(range(10))

        def stopped(call: Callable[..., bool], *arguments: int) -> Future[bool]:
            future = submit(call, *arguments)
            if next(times) == 5:
                raise Interrupted(2)
            return future

        monkeypatch.setattr(pool, "submit", stopped)
        with pytest.raises(Interrupted):
            file.prefetch((at * 10_000, at * 10_000 + 8) for at in range(10))
        file.close()
        assert file.open().read(0, 8) == bytes(8)
        file.close()


@pytest.mark.parametrize("missing", ["diffusion_pytorch_model-00002-of-00003.safetensors", "config.json", ""])
def test_offline_a_part_of_a_cache_is_not_taken_for_the_repo(filled: LoopbackHub, tmp_path: Path, missing: str) -> None:
    """In a process of its own: the client reads the variable once."""
    assert run_mopt("inspect", "hf://alice/base", "--download").exit_code == 0
    snapshot = tmp_path / "_home" / "hub" / "models--alice--base" / "snapshots" / filled.head("alice/base")
    if missing:
        (snapshot / "transformer" / missing).unlink()
    else:
        (snapshot / "transformer").rename(snapshot / "vae")
    command = [sys.executable, "-c", "from modelopt_convert.cli import main; main()", "inspect"]
    environment = hub_environment(filled) | {"HF_HOME": str(tmp_path / "_home"), "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run([*command, "hf://alice/base"], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 3 and "is not in that commit" not in outcome.stderr
    assert "run once without HF_HUB_OFFLINE and with --download" in outcome.stderr
