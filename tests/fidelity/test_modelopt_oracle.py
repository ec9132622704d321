"""ModelOpt is the oracle: what it calibrates on a pipeline, and exports, is what mopt does and writes."""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import PROMPTS, SIZE, STEPS, TINY, calibrate, edit_calibration
from safetensors.torch import load_file
from support import copy, run_mopt

from modelopt_convert.run.workers import torch_on_one_thread

COMMANDS = {"NVFP4_DEFAULT_CFG": "build-nvfp4", "FP8_DEFAULT_CFG": "convert-fp8"}


@pytest.fixture(scope="module", params=COMMANDS)
def quantized(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The pipeline's transformer after ``mtq.quantize`` by diffusers' own calls: the same prompts, seeds and steps."""
    import modelopt.torch.quantization as mtq
    from diffusers import FluxPipeline

    pipeline: Any = FluxPipeline.from_pretrained(TINY, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)

    def run(_: Any) -> None:
        for prompt in PROMPTS:
            pipeline(
                prompt,
                height=SIZE,
                width=SIZE,
                num_inference_steps=STEPS,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch_on_one_thread():
        warnings.simplefilter("ignore")
        mtq.quantize(pipeline.transformer, getattr(mtq, request.param), run)
    return COMMANDS[request.param], pipeline.transformer


def test_every_amax_and_every_exported_input_scale_is_modelopts(
    quantized: tuple[str, Any], calib: Path, tmp_path: Path
) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    command, model = quantized
    said = json.loads((calib / "calibration.json").read_text())["transformers"]["transformer"]["modules"]
    theirs = {
        name: float(module.input_quantizer._amax)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and getattr(module.input_quantizer, "_amax", None) is not None
    }
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert said.keys() == linears and len(theirs) >= 48
    assert theirs == {name: said[name]["amax"] for name in theirs}

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        export_hf_checkpoint(model, export_dir=tmp_path / "export")
    plain = edit_calibration(copy(calib, tmp_path / "plain"), lambda one: one.update(headroom=1.0))
    words = ("--preset", "flux1-dev", "--base", TINY, "--output", tmp_path / "out", "--verify", "cpu")
    built = run_mopt(command, *words, "--calibration", plain, "--keep-bf16", "**.proj_out")
    assert built.exit_code == 0, built.stderr
    ours, exported = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("out", "export"))
    scales = [name for name in ours if name.endswith(".input_scale")]
    assert len(scales) == sum(name.endswith(".weight_scale") for name in ours) > 20
    assert {name: ours[name].flatten().numpy().tobytes() for name in scales} == {
        name: exported[name].flatten().numpy().tobytes() for name in scales
    }
    mine, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "export"))
    keys = {key: mine["quantization_config"].get(key) for key in config["quantization_config"]}
    differ = {"producer", "ignore"}
    assert {key: one for key, one in keys.items() if key not in differ} == {
        key: one for key, one in config["quantization_config"].items() if key not in differ
    }
    assert "dynamic_input_scale" not in mine["quantization_config"]
    assert "activation_scheme" not in mine["quantization_config"]


def test_two_seeds_are_two_runs(calib: Path, tmp_path: Path) -> None:
    """Of a prompt file with one line: the run of seed 0 is among those of the whole file, that of seed 1 is another."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    amax = []
    for seeds in ("1", "2"):
        made = calibrate(tmp_path / seeds, "--seeds", seeds)
        assert made.report is not None and made.report["calibrated"]["runs"] == int(seeds)
        amax.append(load_file(tmp_path / seeds / "stats.safetensors"))
    whole = load_file(calib / "stats.safetensors")
    names = [name for name in whole if name.endswith(".amax")]
    assert all(amax[0][name] <= whole[name] and amax[0][name] <= amax[1][name] for name in names)
    assert any(amax[0][name] < amax[1][name] for name in names)
