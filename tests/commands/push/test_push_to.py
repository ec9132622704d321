"""--push-to on the build commands: rights first, OUT in any case, then the Hub."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from push_support import REPO, contents, published
from support import build, run_mopt


def test_a_build_is_published(hub: LoopbackHub, exports: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = build(exports / "nvfp4", exports / "base", out, "--push-to", REPO)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(hub) == contents(out)
    assert outcome.report["output"]["published"] is True
    assert outcome.report["pushed"]["commit"] == hub.head(REPO)
    assert set(outcome.report["inputs"]) == {"export", "base"} and outcome.report["verify"]["verdict"] == "pass"
    fp8 = ["convert-fp8", "--preset", "flux1-dev", "--export", exports / "fp8", "--base", exports / "base"]
    people = run_mopt(*fp8, "--output", tmp_path / "fp8", "--push-to", "alice/fp8", json_report=False)
    assert people.exit_code == 0 and f"{hub.url}/alice/fp8/commit/{hub.head('alice/fp8')}" in people.stdout
    assert "- fp8\n" in published(hub, "alice/fp8")["README.md"].decode()


def test_rights_come_before_any_work(
    hub: LoopbackHub, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    refused = build(exports / "nvfp4", exports / "base", tmp_path / "out", "--push-to", REPO)
    assert (refused.exit_code, refused.error_code) == (3, "hub.forbidden")
    assert refused.report is not None and refused.report["inputs"] == {} and not (tmp_path / "out").exists()


def test_a_dry_run_asks_and_sends_nothing(hub: LoopbackHub, exports: Path, tmp_path: Path) -> None:
    arguments = [exports / "nvfp4", exports / "base", tmp_path / "out", "--push-to", REPO, "--dry-run"]
    planned = build(*arguments)  # type: ignore[arg-type]
    assert planned.exit_code == 0 and planned.report is not None and planned.report["status"] == "planned"
    assert planned.report["pushed"]["url"] == f"{hub.url}/{REPO}" and planned.report["pushed"]["commit"] is None
    assert {one.method for one in hub.log} == {"GET"} and REPO not in hub.store.repos
    people = run_mopt(
        *("build-nvfp4", "--preset", "flux1-dev", "--export", exports / "nvfp4", "--base", exports / "base"),
        *("--output", tmp_path / "out", "--push-to", REPO, "-n"),
        json_report=False,
    )
    assert f"would push to {hub.url}/{REPO}" in people.stdout


def test_if_the_push_fails_out_stands(hub: LoopbackHub, exports: Path, tmp_path: Path) -> None:
    HfApi().create_repo(REPO)
    hub.fault("/commit/main", method="POST", status=503, times=100)
    out = tmp_path / "out"
    failed = build(exports / "nvfp4", exports / "base", out, "--push-to", REPO)
    assert (failed.exit_code, failed.error_code) == (5, "hub.server")
    assert failed.report is not None and failed.report["output"]["published"] is True
    assert f"mopt push {out} {REPO}" in failed.message
    hub.reset(tmp_path / "later")
    assert run_mopt("push", out, REPO).exit_code == 0 and published(hub) == contents(out)
