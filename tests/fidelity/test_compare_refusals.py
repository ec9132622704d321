"""``mopt compare`` on inputs that are not what they seem: what is counted, what is refused, and by which line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import Outcome, Tensors, edit, edit_json, run_mopt
from tiny_flux1 import FOLDER, inputs_of

from modelopt_convert.run.workers import torch_on_one_thread

PACKED = "transformer_blocks.0.attn.to_q"
PLAIN = "x_embedder.weight"
LOOK = ("--size", "32", "--steps", "1")


def compared(*words: str | Path, base: Path = FOLDER) -> Outcome:
    with torch_on_one_thread():
        return run_mopt("compare", *words, "--base", base, "--device", "cpu")


def drawn(out: Path, prompts: Path, *more: str | Path, base: Path = FOLDER, pipeline: Path = FOLDER) -> Outcome:
    return compared(out, "--pipeline", pipeline, "--prompts", prompts, *LOOK, *more, base=base)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red seven\n")
    return path


def codes(outcome: Outcome) -> list[str]:
    assert outcome.report is not None
    return [one["code"] for one in outcome.report["warnings"]]


def test_equal_prompts_count_once(tiny_nvfp4: Path, prompts: Path) -> None:
    prompts.write_text("a red seven\n" * 4 + " a red seven \n" * 4)
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1", "--require", "cosine>=0.1")
    assert outcome.exit_code == 6 and outcome.error_code == "fidelity.few_pairs" and "found 1" in outcome.message
    assert codes(outcome) == ["prompts.repeated"] and outcome.report is not None
    drawing = outcome.report["drawing"]
    assert (drawing["prompts"], drawing["pairs"], len(outcome.report["checkpoints"][0]["images"])) == (1, 1, 1)
    # What drew them: no video, the tokenizer's limit, and files that are known by their digests.
    assert drawing["frames"] is None and drawing["max_sequence_length"] == 16
    assert drawing["identity"].keys() == {"model_index_sha256", "files_xxh3_128"}
    said = [line.partition(":")[0] for line in outcome.stderr.splitlines()]
    assert said == ["1 runs of the base, and of 1 checkpoint", "warning", "error", "hint"]  # and no word of a library


def test_equal_inputs_count_once(tiny_nvfp4: Path, tmp_path: Path) -> None:
    call = inputs_of(FOLDER / "transformer")
    other = inputs_of(FOLDER / "transformer", timestep=torch.tensor([0.9]))
    calls = [call] * 8 + [other]
    save_file(
        {f"{n}.{name}": one.clone() for n, each in enumerate(calls) for name, one in each.items()}, tmp_path / "i"
    )
    outcome = compared(tiny_nvfp4, "--inputs", tmp_path / "i", "--require", "cosine>=0.1")
    assert outcome.exit_code == 6 and "found 2" in outcome.message and codes(outcome) == ["fidelity.repeated"]


def _integers(tensors: Tensors) -> None:
    tensors[PLAIN] = tensors[PLAIN].to(torch.int64)


def _larger(tensors: Tensors) -> None:
    tensors[PLAIN] = torch.cat([tensors[PLAIN], tensors[PLAIN]])


def _lost(tensors: Tensors) -> None:
    del tensors[PLAIN]


def _invented(tensors: Tensors) -> None:
    tensors["invented"] = torch.zeros(2)


def _cut(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"] = tensors[f"{PACKED}.weight"][:-1]


def _shrunk(tensors: Tensors) -> None:
    """A whole module of another size, which is consistent in itself."""
    for role in ("weight", "weight_scale", "bias"):
        tensors[f"{PACKED}.{role}"] = tensors[f"{PACKED}.{role}"][:-16]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_integers, (repr(PLAIN), "expected BF16", "found I64")),
        (_larger, (repr(PLAIN), "as in the base", "found [")),
        (_lost, (repr(PLAIN), "no such tensor")),
        (_invented, ("'invented'", "has none of this name")),
        (_cut, (f"{PACKED}.weight",)),
        (_shrunk, (f"{PACKED}.weight", "as in the base")),
    ],
)
def test_tensors_that_are_not_the_bases_are_named_with_their_file(
    change: Callable[[Tensors], None], words: tuple[str, ...], tiny_nvfp4: Path, tmp_path: Path
) -> None:
    outcome = compared(edit(tiny_nvfp4, tmp_path / "out", change))
    assert outcome.exit_code == 3, outcome.stderr
    assert str(tmp_path / "out") in outcome.message and all(one in outcome.message for one in words), outcome.message
    assert "give a base with" not in outcome.message


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "pipeline.json"),
        (b"\xff\xfe", "pipeline.json"),
        (b"[1]", "pipeline.json"),
        (b'{"_class_name": "os.system"}', "pipeline.index"),
        (b'{"_class_name": "FluxTransformer2DModel"}', "pipeline.index"),
        (b'{"_class_name": "FluxPipeline", "scheduler": ["diffusers", "x"], "vae": "x"}', "pipeline.index"),
    ],
)
def test_a_damaged_pipeline_is_one_line(
    content: bytes, code: str, tiny_nvfp4: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_bytes(content)
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1", pipeline=tmp_path / "pipeline")
    assert outcome.exit_code == 3 and outcome.error_code == code, outcome.stderr


def test_a_component_that_cannot_be_loaded_is_one_line(tiny_nvfp4: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "pipeline")
    edit_json(tmp_path / "pipeline" / "model_index.json", lambda index: index.update(vae=["nosuch", "Nothing"]))
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1", pipeline=tmp_path / "pipeline")
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.load", outcome.stderr


def test_a_repo_that_the_hub_does_not_give_is_one_line(
    tiny_nvfp4: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def no(*_: object) -> str:
        raise OSError("no such repo")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no)
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1", pipeline=Path("nosuch"))
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.load" and "no such repo" in outcome.message


def test_a_repo_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from modelopt_convert.fidelity.pipeline import pipeline_identity, takes_frames

    shutil.copytree(FOLDER, tmp_path / "snapshots" / "0123abcd")
    index = tmp_path / "snapshots" / "0123abcd" / "model_index.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(index))
    assert pipeline_identity("somebody/tiny", ["transformer"]) == {"repo": "somebody/tiny", "commit": "0123abcd"}
    assert takes_frames("somebody/tiny") is False


def _nan(tensors: Tensors) -> None:
    tensors["transformer_blocks.0.norm1.linear.weight"][0] = torch.nan


def test_the_first_module_that_gives_no_number_is_named(tiny_nvfp4: Path, prompts: Path, tmp_path: Path) -> None:
    out, base = edit(tiny_nvfp4, tmp_path / "out", _nan), edit(FOLDER, tmp_path / "base", _nan)
    for outcome, whose in (
        (compared(out, "--seeds", "1"), f"{out}: module "),
        (compared(tiny_nvfp4, "--seeds", "1", base=base), "the base: module "),
        (drawn(tiny_nvfp4, prompts, "--seeds", "1", base=base), "the base: module "),
    ):
        assert outcome.exit_code == 3 and outcome.error_code == "fidelity.not_finite", outcome.stderr
        assert f"{whose}'transformer_blocks.0.norm1.linear'" in outcome.message


def test_a_vae_that_gives_no_number_is_told(tiny_nvfp4: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    right = AutoencoderKL.decode

    def no_number(*words: Any, **named: Any) -> Any:
        (found,) = right(*words, **named)
        return (found * torch.nan,)

    monkeypatch.setattr(AutoencoderKL, "decode", no_number)
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1")
    assert outcome.error_code == "fidelity.not_finite" and "no module of the transformer" in outcome.message


def test_a_config_that_contradicts_the_tensors_is_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    def fp8(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_algo"] = "FP8"

    outcome = compared(edit(tiny_nvfp4, tmp_path / "out", change_config=fp8), "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.declared"
    assert "expected 'NVFP4'" in outcome.message and "found 'FP8'" in outcome.message


def test_a_rule_that_no_config_declares_is_told(tiny_nvfp4: Path, tmp_path: Path) -> None:
    def calibrated(tensors: Tensors) -> None:
        names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
        tensors |= {f"{name}.input_scale": torch.tensor(1e-6) for name in names}

    out = edit(tiny_nvfp4, tmp_path / "out", calibrated, lambda config: config.pop("quantization_config"))
    outcome = compared(out, "--seeds", "1")
    # Scales as small as these cut nearly everything off.
    assert outcome.exit_code == 0 and codes(outcome)[0] == "fidelity.rule_taken"
    assert codes(outcome)[-1] == "fidelity.clipped", outcome.stderr


def test_equal_pictures_pass_what_is_required(tiny_nvfp4: Path, prompts: Path, tmp_path: Path) -> None:
    """The base is the checkpoint's own decoded weights: nothing but the weights is quantized, so nothing differs."""
    base, page = tmp_path / "base", tmp_path / "page.html"
    decoded = run_mopt("convert", tiny_nvfp4, base, "--to", "bf16", "--base", FOLDER)
    assert decoded.exit_code == 0, decoded.stderr
    prompts.write_text("\n".join(f"a red seven {number}" for number in range(8)))
    words = ("--seeds", "1", "--rule", "weight-only", "--report", page)
    outcome = drawn(tiny_nvfp4, prompts, *words, "--require", "psnr>=26,sqnr_db>=10,rmse<=0", base=base)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    one = outcome.report["checkpoints"][0]
    assert one["aggregate"]["psnr"] == {"mean": None, "std": None, "lower95": None, "upper95": None, "n": 8}
    assert [each["met"] for each in one["required"]] == [True] * 3 and one["aggregate"]["rmse"]["mean"] == 0
    json.loads(json.dumps(outcome.report, allow_nan=False))
    assert page.read_text().count("<small>equal, SSIM 1.0000</small>") == 8


@pytest.mark.parametrize(
    "words",
    [
        "--steps 2",
        "--frames 2",
        "--inputs x --size 32",
        "--size 33",
        "--size 8",
        "--pipeline x --prompts y --require lpips<=1",
    ],
)
def test_what_cannot_be_meant_or_measured_is_a_usage_error(words: str, tmp_path: Path) -> None:
    outcome = run_mopt("compare", tmp_path, "--base", tmp_path, *words.split())
    assert outcome.exit_code == 2 and outcome.error_code == "usage"
    assert ("package lpips" in outcome.message) == ("lpips" in words)


@pytest.mark.parametrize("command", ["calibrate", "advise"])
def test_offload_is_for_a_gpu(command: str, tmp_path: Path) -> None:
    words = ("--pipeline", "x", "--prompts", "y", "--output", tmp_path / "z", "--offload", "model", "--device", "cpu")
    more = ("--budget", "1GB") if command == "advise" else ()
    outcome = run_mopt(command, tmp_path, *words, *more)
    assert outcome.exit_code == 2 and "is for a GPU" in outcome.message


def test_offload_without_a_gpu_is_refused(tiny_nvfp4: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("--pipeline", FOLDER, "--prompts", prompts, *LOOK, "--offload", "sequential")
    outcome = run_mopt("compare", tiny_nvfp4, "--base", FOLDER, *words)
    assert outcome.exit_code == 6 and outcome.error_code == "device.none"


def test_a_pipeline_that_draws_another_size_is_refused(
    tiny_nvfp4: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.fidelity import pipeline

    right = pipeline.frames_of
    monkeypatch.setattr(pipeline, "frames_of", lambda shown: right(shown)[:, :16, :16])
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1")
    assert outcome.error_code == "pipeline.size" and "draws 16 x 16" in outcome.message


def test_a_gpu_that_is_too_small_is_told(tiny_nvfp4: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(FluxPipeline, "prepare_latents", full)
    outcome = drawn(tiny_nvfp4, prompts, "--seeds", "1")
    assert outcome.exit_code == 5 and outcome.error_code == "device.memory", outcome.stderr
    assert "Tried to allocate" in outcome.message and "--offload sequential" in outcome.message
    monkeypatch.setattr(FluxTransformer2DModel, "forward", full)
    alone = compared(tiny_nvfp4, "--seeds", "1")
    assert alone.error_code == "device.memory" and "--device cpu" in alone.message


def test_files_that_are_folders_are_called_so(tiny_nvfp4: Path, tmp_path: Path) -> None:
    outcome = drawn(tiny_nvfp4, tmp_path)
    assert outcome.error_code == "prompts.missing" and "found a folder" in outcome.message
    outcome = compared(tiny_nvfp4, "--inputs", tmp_path)
    assert outcome.error_code == "fidelity.inputs" and "found a folder" in outcome.message


def test_arguments_that_are_twice_absent_or_unknown_are_named(tiny_nvfp4: Path, tmp_path: Path) -> None:
    given, path = inputs_of(FOLDER / "transformer"), tmp_path / "in.safetensors"
    for changed, words in (
        ({**given, "0.hidden_states": given["hidden_states"].clone()}, "hidden_states of call 0 once"),
        ({name: one for name, one in given.items() if name != "timestep"}, "not among them: timestep"),
        ({**given, "foo": torch.zeros(1)}, "has no argument foo"),
    ):
        save_file(changed, path)
        outcome = compared(tiny_nvfp4, "--inputs", path)
        assert outcome.exit_code == 3 and outcome.error_code == "fidelity.inputs" and words in outcome.message
