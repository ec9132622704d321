"""mopt doctor: everything is a line, nothing a failure, and the token is never told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import get_token
from loopback_hub import LoopbackHub
from support import run_mopt

from modelopt_convert.commands import doctor
from modelopt_convert.verification.gemm.backends import BACKENDS
from modelopt_convert.verification.gemm.backends.reference import Reference

PARTS = {"version", "gpu", "backend", "hub", "disk", "works"}


def findings(*words: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Of a run, by part and name."""
    outcome = run_mopt("doctor", *words)
    assert outcome.exit_code == 0 and outcome.report is not None and outcome.report["schema"] == "mopt.doctor/1"
    found = {(one["part"], one["name"]): one for one in outcome.report["findings"]}
    assert len(found) == len(outcome.report["findings"]) and {part for part, _ in found} == PARTS
    return found


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of whoever runs the tests, and no Hub."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


@pytest.mark.usefixtures("nobody")
def test_every_part_is_looked_at(tmp_path: Path) -> None:
    found = findings(tmp_path / "not" / "yet")
    assert found["version", "torch"]["found"] == version("torch")
    names = {name for part, name in found if part == "backend"}
    assert names == {f"{one.name} {algorithm}, {one.kind}" for one in BACKENDS for algorithm in one.formats}
    assert found["backend", "reference nvfp4, reference"]["status"] == "ok"
    assert found["hub", "login"]["status"] == "missing" and found["works", "mopt push"]["status"] == "missing"
    assert found["disk", str(tmp_path / "not" / "yet")]["found"].endswith(" GB free")
    assert found["works", "build, convert, rewrite"]["found"] == "yes"
    told = run_mopt("doctor", tmp_path, json_report=False)
    assert told.exit_code == 0 and told.stdout.startswith("versions:\nok: mopt: ")
    assert "what works here:\nok: build, convert, rewrite: yes\n" in told.stdout


@pytest.mark.usefixtures("nobody")
def test_a_library_that_is_broken_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = findings()
    assert found["gpu", "torch"]["status"] == found["backend", "GEMM"]["status"] == "broken"
    assert "torch cannot be used" in found["works", "build, convert, rewrite"]["found"]
    assert found["works", "native fp8 kernels"]["status"] == "missing"


@pytest.mark.usefixtures("nobody")
def test_a_backend_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Reference, _device: object) -> None:
        raise AttributeError("no such symbol")

    monkeypatch.setattr(Reference, "unavailable", broken)
    found = findings()
    assert found["backend", "reference fp8, reference"]["found"] == "AttributeError: no such symbol"
    assert found["works", "build, convert, rewrite"]["status"] == "ok"


@pytest.mark.usefixtures("nobody")
def test_a_library_that_is_not_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MORE", (*doctor._MORE, "no-such-library"))
    assert findings()["version", "no-such-library"]["status"] == "missing"


@pytest.mark.usefixtures("nobody")
def test_a_folder_that_cannot_be_looked_at_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    found = findings("here")
    assert found["disk", "here"]["status"] == "broken" and "here" in found["works", "build, convert, rewrite"]["found"]


def test_the_login_is_told_and_never_the_token(hub: LoopbackHub) -> None:
    found = findings()
    token = get_token()
    assert token is not None and found["hub", "login"]["found"] == "logged in as alice"
    assert found["works", "mopt push"]["status"] == "ok"
    for flags in ((), ("--json",)):
        told = run_mopt("doctor", *flags, json_report=False)
        assert "alice" in told.stdout and token not in told.stdout + told.stderr


def test_a_hub_that_fails_is_a_line_without_the_token(hub: LoopbackHub) -> None:
    token = get_token()
    hub.fault("/api/whoami-v2", status=401, times=100)
    told = run_mopt("doctor")
    assert told.exit_code == 0 and told.report is not None and token is not None
    (login,) = [one for one in told.report["findings"] if one["name"] == "login"]
    assert login["status"] == "broken" and login["found"].startswith(
        "there is a token, and the Hub did not say whose: "
    )
    assert token not in told.stdout + told.stderr


@pytest.mark.usefixtures("nobody")
def test_a_full_disk_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: free)
    found = findings("here")
    assert found["disk", "here"]["status"] == "broken" and "full" in found["works", "build, convert, rewrite"]["found"]


@pytest.mark.usefixtures("nobody")
def test_a_cache_that_cannot_be_used_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "home"))
    one = findings()["hub", "cache"]
    assert one["status"] == "broken" and one["found"].startswith(f"{tmp_path / 'file'} is no folder; set HF_HOME")


@pytest.fixture
def silent_hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process whose Hub takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x", "HF_ENDPOINT": endpoint}
        yield {**{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}, **home}


def test_a_hub_that_never_answers_is_a_line(silent_hub: dict[str, str]) -> None:
    command = [sys.executable, "-m", "modelopt_convert", "doctor"]
    told = subprocess.run(command, env=silent_hub, capture_output=True, text=True, timeout=90, check=True)
    assert "broken: login: there is a token, and the Hub did not say whose: " in told.stdout
    assert "in 5 s" in told.stdout and "hf_x" not in told.stdout


def test_each_line_comes_as_it_is_found_and_a_signal_ends_with_what_was_found(silent_hub: dict[str, str]) -> None:
    """The first lines are there while the Hub is still waited for; under ``--json`` a signal gives one object, too."""
    command = [sys.executable, "-m", "modelopt_convert", "doctor"]
    with subprocess.Popen(command, env=silent_hub, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "versions:\n" and run.stderr is not None
        assert run.stdout.readline().startswith("ok: mopt: ")
        run.send_signal(signal.SIGINT)
        rest, said = run.stdout.read(), run.stderr.read()
    assert run.returncode == 130 and "what works here" not in rest and "stopped by signal 2 [interrupted]" in said
    with subprocess.Popen(
        [*command, "--json"], env=silent_hub, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        maps = Path(f"/proc/{run.pid}/maps")
        while "torch" not in maps.read_text():  # from then on signals are handled
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        stdout, _ = run.communicate(timeout=60)
    report = json.loads(stdout)
    assert (run.returncode, report["exit_code"], report["status"]) == (130, 130, "interrupted")
    assert ("version", "mopt") in {(one["part"], one["name"]) for one in report["findings"]}
