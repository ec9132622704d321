"""mopt doctor: everything is a line, nothing a failure, and the token is never told."""

import sys
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
    assert told.exit_code == 0 and told.stdout.startswith("what works here:\nok: build, convert, rewrite: yes\n")


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
