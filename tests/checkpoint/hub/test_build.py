"""The whole line on the Hub: a build with nothing but a preset, published, and verified where it was published."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_support import hub_environment
from loopback_hub import LoopbackHub
from support import config_of, load, run_mopt, same_bits, tree

BASE = "black-forest-labs/FLUX.1-dev"
MINE = "alice/flux1-dev-nvfp4"


@pytest.fixture
def filled(any_hub: LoopbackHub, base: Path) -> LoopbackHub:
    any_hub.seed(BASE, base)
    return any_hub


def test_a_preset_is_all_that_is_needed(filled: LoopbackHub, base: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user would start it."""
    room = tmp_path / "room"
    room.mkdir()
    command = [sys.executable, "-c", "from modelopt_convert.cli import main; main()"]
    environment = hub_environment(filled)

    def mopt(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=room, env=environment, capture_output=True, text=True)

    filled.log.clear()
    built = mopt("build-nvfp4", "--preset", "flux1-dev")
    assert built.returncode == 0, built.stderr
    first = built.stderr.splitlines()[0]
    assert first == f"no --export: quantizing hf://{BASE}/transformer, uncalibrated, fetching 0.0 GB"
    assert [path.name for path in room.iterdir()] == ["flux1-dev-nvfp4"]
    weights = sum(path.stat().st_size for path in (base / "transformer").glob("*.safetensors"))
    assert filled.bytes_out("/_cdn/") <= weights * 1.05
    pushed = mopt("push", "flux1-dev-nvfp4", MINE)
    assert pushed.returncode == 0 and f"{filled.url}/{MINE}" in pushed.stdout, pushed.stderr
    verified = mopt("verify", f"hf://{MINE}", "--base", f"hf://{BASE}")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert {name for name in filled.tree(MINE)} >= {path.name for path in (room / "flux1-dev-nvfp4").iterdir()}


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_what_is_quantized_from_the_hub_is_what_is_quantized_from_disk(
    filled: LoopbackHub, base: Path, tmp_path: Path, command: str
) -> None:
    far = run_mopt(command, "--preset", "flux1-dev", "--output", tmp_path / "far", "--push-to", MINE)
    assert far.exit_code == 0 and far.report is not None, far.stderr
    words = ("--base", base, "--base-model", BASE, "--output", tmp_path / "near")
    near = run_mopt(command, "--preset", "flux1-dev", *words)
    assert near.exit_code == 0
    one, other = tree(tmp_path / "far"), tree(tmp_path / "near")
    assert {name for name in one if one[name] != other[name]} == {"mopt.json"} and one.keys() == other.keys()
    assert config_of(tmp_path / "far")["quantization_config"]["dynamic_input_scale"] is True
    assert far.report["network"]["base"]["commit"] == filled.head(BASE)
    assert far.report["warnings"][0]["code"] == "build.uncalibrated" and far.report["calibration"] == "none"
    assert far.report["pushed"]["commit"] == filled.head(MINE)
    assert run_mopt("verify", f"hf://{MINE}@{filled.head(MINE)}").exit_code == 0


def test_the_base_of_the_preset_serves_an_export_too(
    filled: LoopbackHub, nvfp4: Path, built_nvfp4: Path, tmp_path: Path
) -> None:
    far = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--export", nvfp4, "--output", tmp_path / "far")
    assert far.exit_code == 0 and far.report is not None
    assert "base.default" in {warning["code"] for warning in far.report["warnings"]}
    one, other = load(tmp_path / "far"), load(built_nvfp4)
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def test_diffusers_lists_and_downloads_what_was_published(filled: LoopbackHub, built: Path, tmp_path: Path) -> None:
    """Not to load it: diffusers cannot read packed weights. Its own loader finds, fetches and places the files."""
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.utils.hub_utils import _get_checkpoint_shard_files, _get_model_file

    class Model(ConfigMixin):
        config_name = "config.json"

    checkpoint = built
    assert run_mopt("push", checkpoint, MINE).exit_code == 0
    assert Model.load_config(MINE)["quantization_config"]["quant_algo"] == "NVFP4"
    weights = "diffusion_pytorch_model.safetensors"
    if (checkpoint / weights).is_file():
        found = [_get_model_file(MINE, weights_name=weights)]
    else:
        index = _get_model_file(MINE, weights_name=f"{weights}.index.json")
        found = _get_checkpoint_shard_files(MINE, index)[0]
    assert {Path(one).name: Path(one).read_bytes() for one in found} == {
        path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")
    }
    assert "transformers" not in sys.modules or "MOPT_TEST_HUB" not in os.environ


def test_a_base_has_to_come_from_somewhere(hub: LoopbackHub, nvfp4: Path, tmp_path: Path) -> None:
    for words in ((), ("--preset", "none", "--output", tmp_path / "out"), ("--export", nvfp4)):
        outcome = run_mopt("build-nvfp4", *words)
        assert outcome.exit_code == 2 and "--base" in outcome.stderr
    missing = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--output", tmp_path / "out")
    assert (missing.exit_code, missing.error_code) == (3, "hub.no_repo") and not (tmp_path / "out").exists()
