"""Whom a checkpoint is for: what an engine is known not to load right is refused by builds and push, told by all."""

import json
from pathlib import Path
from typing import Any

import pytest
import sglang_runtime
import torch
from families import PRESETS
from loopback_hub import LoopbackHub
from support import Outcome, config_of, load, run_mopt

from modelopt_convert import push
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.run.errors import InputError


@pytest.fixture(scope="module")
def flux2(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2 in NVFP4: wrong in SGLang, right in vLLM-omni."""
    out = tmp_path_factory.mktemp("flux2") / "out"
    outcome = built(families, "flux2", out, "--allow-known-broken")
    assert outcome.exit_code == 0, outcome.stderr
    return out


def built(families: Path, family: str, out: Path, *more: str, json_report: bool = True) -> Outcome:
    where = families / family
    given = ("--preset", PRESETS[family][0], "--export", where / "nvfp4", "--base", where / "base", "--output", out)
    return run_mopt("build-nvfp4", *given, *more, json_report=json_report)


@pytest.mark.parametrize(
    ("family", "engine", "grade"),
    [
        ("flux2", "sglang", "loads it wrong"),
        ("ltx2", "sglang", "fails to load it"),
        ("wan", "vllm-omni", "loads it wrong"),
        ("flux1", "vllm-omni", "fails to load it"),
        ("flux1", "diffusers", "fails to load it"),
        ("qwen_image", "comfyui", "fails to load it"),
    ],
)
def test_what_an_engine_does_not_load_right_is_refused(
    families: Path, tmp_path: Path, family: str, engine: str, grade: str
) -> None:
    outcome = built(families, family, tmp_path / "out", "--engine", engine)
    assert (outcome.exit_code, outcome.error_code) == (3, "engine.known_broken")
    assert f"{engine}@" in outcome.message and grade in outcome.message and not (tmp_path / "out").exists()
    hint = outcome.report["error"]["hint"] if outcome.report else ""
    assert "--engine" in hint and "--allow-known-broken" in hint


@pytest.mark.parametrize(("family", "engine"), [("flux2", "vllm-omni"), ("wan", "sglang")])
def test_what_another_engine_does_not_load_right_is_told(
    families: Path, tmp_path: Path, family: str, engine: str
) -> None:
    outcome = built(families, family, tmp_path / "out", "--engine", engine)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    known: list[dict[str, Any]] = outcome.report["engines"]
    assert outcome.report["engine"] == engine and not [one for one in known if one["engine"] == engine]
    assert {"diffusers", "comfyui"} < {one["engine"] for one in known}
    assert not [one for one in outcome.report["warnings"] if one["code"].startswith("engine.")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(one["what"] in card for one in known)


def test_a_loss_is_told_with_its_figure_and_not_refused(families: Path, tmp_path: Path) -> None:
    outcome = built(families, "hunyuan_video", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    [loss] = [one for one in outcome.report["warnings"] if one["code"] == "engine.loss"]
    assert "sglang@0.5.23 loads it with a loss" in loss["message"] and "3 %" in loss["message"]


@pytest.mark.parametrize(
    ("family", "more", "loads"),
    [
        ("flux1", (), True),
        ("flux2", ("--allow-known-broken",), False),
        ("flux2", ("--engine", "vllm-omni"), False),
        ("hunyuan_video", (), True),
    ],
)
def test_the_next_command_is_none_that_is_known_to_fail(
    families: Path, tmp_path: Path, family: str, more: tuple[str, ...], loads: bool
) -> None:
    outcome = built(families, family, tmp_path / "out", *more, "--base-model", "org/model", json_report=False)
    assert outcome.exit_code == 0, outcome.stderr
    [line] = [line for line in outcome.stdout.splitlines() if line.startswith("next: ")]
    again = f"next: mopt verify {tmp_path / 'out'} --base {families / family / 'base'}"
    assert line.startswith("next: sglang generate --model-path org/model ") if loads else line == again
    [others] = [line for line in outcome.stdout.splitlines() if line.startswith("other engines: ")]
    assert "diffusers fails" in others and ("sglang wrong" in others) == ("vllm-omni" in more)


def test_the_card_names_no_command_that_is_known_to_fail(flux2: Path, families: Path, tmp_path: Path) -> None:
    card = (flux2 / "README.md").read_text()
    assert "sglang generate" not in card and "Not in sglang@0.5.23" in card and "norm_out.linear" in card
    assert built(families, "hunyuan_video", tmp_path / "out").exit_code == 0
    assert "sglang generate" in (tmp_path / "out" / "README.md").read_text()


def test_inspect_and_verify_say_it(flux2: Path) -> None:
    seen = json.loads(run_mopt("inspect", flux2).stdout)
    [fault] = [one for one in seen["lint"] if one["code"] == "engine.wrong"]
    assert "norm_out.linear" in fault["message"]
    outcome = run_mopt("verify", flux2, "--device", "cpu")
    assert outcome.exit_code == 0 and outcome.report is not None
    [container] = [one for one in outcome.report["verify"]["levels"] if one["level"] == "L0"]
    assert container["status"] == "warn" and any("norm_out.linear" in one for one in container["warnings"])


def test_push_asks_too(flux2: Path, hub: LoopbackHub) -> None:
    with pytest.raises(InputError) as refused:
        push(flux2, "alice/flux2")
    assert refused.value.code == "engine.known_broken"
    assert not [one for one in hub.log if one.method == "POST"]
    report = push(flux2, "alice/flux2", engine="vllm-omni")
    assert report.pushed is not None and report.pushed.commit is not None and report.pushed.load is None
    again = push(flux2, "alice/flux2", allow_known_broken=True)
    assert again.pushed is not None and again.pushed.load is None
    assert [one["code"] for one in again.warnings if one["code"].startswith("engine")] == ["engine.known_broken"]


@pytest.mark.parametrize(("family", "command"), [("flux1", "build-nvfp4"), ("wan", "convert-fp8")])
def test_without_a_preset_the_names_of_the_class_are_known(
    families: Path, tmp_path: Path, family: str, command: str
) -> None:
    """SGLang cast 21 kept modules of Wan to FP8 where `ignore` had names on disk alone."""
    where, algorithm = families / family, command.rpartition("-")[2]
    given = ("--preset", "none", "--export", where / algorithm, "--base", where / "base", "--output", tmp_path / "out")
    outcome = run_mopt(command, *given)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    config = config_of(tmp_path / "out")
    out, ignore = load(tmp_path / "out"), config["quantization_config"]["ignore"]
    kept = {
        module_of(name)
        for name, one in out.items()
        if name.endswith(".weight") and one.ndim >= 2 and one.dtype == torch.bfloat16
    }
    for module in kept:
        names = sglang_runtime.runtime_names(config, module)
        assert [name for name in names if not sglang_runtime.is_excluded(name, ignore)] == [], module
    against = [one["message"] for one in outcome.report["warnings"] if one["code"] == "preset.structural"]
    if family == "flux1":  # its export packs norm1.linear, which SGLang cannot load packed
        [message] = against
        assert "single_transformer_blocks.0.norm.linear" in message and "--preset flux1-dev" in message
    else:
        assert against == []
