"""``mopt compare`` on the trained pipeline: against a run by other code, planted faults, and every refusal."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from root import ROOT
from safetensors.torch import save_file
from support import Outcome, Tensors, edit, load, run_mopt
from tiny_flux1 import FOLDER, drawn, independent_pipeline, inputs_of

from modelopt_convert.fidelity import emulation
from modelopt_convert.run.workers import torch_on_one_thread

STEPS = 2
LOOK = ("--size", "32", "--steps", str(STEPS), "--device", "cpu")
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "schemas" / "mopt.fidelity-1.json").read_text()))
MODULE = "single_transformer_blocks.1.attn.to_v"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red seven\n")
    return path


def compared(*words: str | Path, prompts: Path | None = None, base: Path = FOLDER) -> Outcome:
    if prompts is not None:
        words = (*words, "--pipeline", FOLDER, "--prompts", prompts, *LOOK)
    elif "--inputs" not in words:
        words = (*words, "--size", "32")
    with torch_on_one_thread():
        return run_mopt("compare", *words, "--base", base, "--device", "cpu")


def found(outcome: Outcome) -> dict[str, Any]:
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert [*SCHEMA.iter_errors(outcome.report)] == []
    return outcome.report


def calibrated(tensors: Tensors) -> None:
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    tensors |= {f"{name}.input_scale": torch.tensor(0.004) for name in names}


@pytest.fixture(scope="session")
def static(tiny_nvfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The NVFP4 build with input scales."""
    folder = tmp_path_factory.mktemp("static") / "out"
    return edit(tiny_nvfp4, folder, calibrated, lambda config: config["quantization_config"].pop("dynamic_input_scale"))


def test_figures_are_those_of_a_run_by_other_code(
    tiny_nvfp4: Path, tiny_fp8: Path, static: Path, prompts: Path, tmp_path: Path
) -> None:
    """Latents of a trained model differ by roundings alone; figures are far closer than formats are."""
    page = tmp_path / "page.html"
    first = found(compared(tiny_nvfp4, tiny_fp8, "--seeds", "2", "--report", page, prompts=prompts))
    second = found(compared(static, "--seeds", "2", prompts=prompts))
    checkpoints = [*first["checkpoints"], *second["checkpoints"]]
    assert [one["emulation"]["rule"] for one in checkpoints] == [
        "W4A4, dynamic input scales", "W8A8, dynamic input scales", "W4A4, static input scales",
    ]  # fmt: skip
    plain = independent_pipeline(None)
    bases = [drawn(plain, "a red seven", seed, STEPS) for seed in range(2)]
    psnrs = []
    for one, folder in zip(checkpoints, (tiny_nvfp4, tiny_fp8, static), strict=True):
        assert one["emulation"]["native"] is False and one["path"] == str(folder)
        pipeline = independent_pipeline(folder)
        for seed, (base_latents, base_image) in enumerate(bases):
            latents, image = drawn(pipeline, "a red seven", seed, STEPS)
            said = one["images"][seed]
            exact, got = base_latents[-1].flatten(), latents[-1].flatten()
            cosine = float(exact @ got / (exact.norm() * got.norm()))
            assert 1 - said["cosine"] == pytest.approx(1 - cosine, rel=0.05)
            assert said["rmse"] == pytest.approx(float((exact - got).square().mean().sqrt()), rel=0.03)
            psnr = -10 * float((base_image - image).square().mean().log10())
            assert said["psnr"] == pytest.approx(psnr, abs=0.3)
            psnrs.append(psnr)
        steps = [1 - each["cosine"] for each in one["steps"]]
        assert len(steps) == STEPS and one["aggregate"]["psnr"]["n"] == 2
        assert one["aggregate"]["psnr"]["mean"] == pytest.approx(sum(psnrs[-2:]) / 2, abs=0.3)
    assert min(psnrs[2:4]) > max(*psnrs[:2], *psnrs[4:]) + 3  # FP8 is nearer than NVFP4, by more than the tolerance
    check_modules(checkpoints[0], load(tiny_nvfp4), 18.0, 22.0)
    check_modules(checkpoints[1], load(tiny_fp8), 28.0, 40.0)
    check_page(page.read_text())


def check_modules(one: dict[str, Any], tensors: Tensors, least: float, most: float) -> None:
    packed = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert one["modules"].keys() == packed
    roles = {"weight", "weight_scale", "weight_scale_2", "bias"}
    theirs = {name for name in tensors if name.rpartition(".")[0] in packed and name.rpartition(".")[2] in roles}
    assert one["unquantized"] == len(tensors) - len(theirs)
    for module in one["modules"].values():
        assert module["calls"] == STEPS and module["clipped"] == 0.0
        assert least < module["weight_sqnr_db"] < most and least < module["input_sqnr_db"] < most
        assert least - 5 < module["output_sqnr_db"] < most + 6
    assert len(one["blocks"]) == 6 and all(0.97 < value < 1 for value in one["blocks"].values())


def check_page(text: str) -> None:
    assert text.count("<img ") == 2 * 5 and "<script" not in text and 'src="data:image/png;base64,' in text
    assert "a red seven" in text and re.search(r"PSNR \d\d\.\d\d dB", text)
    assert "http" not in text.replace("http-equiv", "") and "img-src data:" in text


def test_without_quantized_activations_a_checkpoint_is_nearer(tiny_nvfp4: Path, alone: dict[str, Any]) -> None:
    only = found(compared(tiny_nvfp4, "--seeds", "2", "--rule", "weight-only"))["checkpoints"][0]
    assert only["emulation"]["rule"] == "W4A16"
    assert all(module["input_sqnr_db"] is None for module in only["modules"].values())
    assert only["aggregate"]["rmse"]["mean"] < alone["aggregate"]["rmse"]["mean"]


def _halved(tensors: Tensors) -> None:
    tensors[f"{MODULE}.weight_scale_2"] /= 2


def _swapped(tensors: Tensors) -> None:
    packed = tensors[f"{MODULE}.weight"]
    tensors[f"{MODULE}.weight"] = (packed << 4) | (packed >> 4)


def _norm(tensors: Tensors) -> None:
    """An unquantized tensor of OUT that is not the base's."""
    tensors["x_embedder.weight"] *= 1.1


@pytest.fixture(scope="session")
def alone(tiny_nvfp4: Path) -> dict[str, Any]:
    """Of the transformer alone, on random inputs, which takes less time."""
    report = found(compared(tiny_nvfp4, "--seeds", "2"))
    assert report["drawing"]["kind"] == "random inputs"
    assert [one["code"] for one in report["warnings"]] == ["fidelity.random"]
    one: dict[str, Any] = report["checkpoints"][0]
    assert "psnr" not in one["aggregate"] and 0.9 < one["aggregate"]["cosine"]["mean"] < 1
    return one


@pytest.mark.parametrize("fault", [_halved, _swapped, _norm])
def test_planted_faults_are_seen(
    fault: Callable[[Tensors], None], alone: dict[str, Any], tiny_nvfp4: Path, tmp_path: Path
) -> None:
    damaged = edit(tiny_nvfp4, tmp_path / "out", fault)
    one = found(compared(damaged, "--seeds", "2"))["checkpoints"][0]
    assert one["aggregate"]["cosine"]["mean"] < alone["aggregate"]["cosine"]["mean"] - 1e-5
    changed = {name for name in one["modules"] if one["modules"][name] != alone["modules"][name]}
    assert changed == (set() if fault is _norm else {MODULE})
    if fault is _halved:
        assert one["modules"][MODULE]["weight_sqnr_db"] == pytest.approx(6.0, abs=0.3)
    if fault is _swapped:
        assert one["modules"][MODULE]["output_sqnr_db"] < 3


def test_an_input_scale_that_is_too_small_clips(static: Path, tmp_path: Path) -> None:
    def scaled(value: float) -> dict[str, Any]:
        damaged = edit(static, tmp_path / str(value), lambda tensors: tensors[f"{MODULE}.input_scale"].fill_(value))
        module: dict[str, Any] = found(compared(damaged, "--seeds", "1"))["checkpoints"][0]["modules"][MODULE]
        return module

    small, large = scaled(1e-5), scaled(1e3)
    assert small["clipped"] > 0.5 and small["input_sqnr_db"] < 5
    assert large["zero_blocks"] == 1.0 and large["clipped"] == 0.0


def test_captured_inputs_are_run(tiny_nvfp4: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    calls = [inputs_of(FOLDER / "transformer"), inputs_of(FOLDER / "transformer", timestep=torch.tensor([0.9]))]
    save_file({f"{n}.{name}": one for n, call in enumerate(calls) for name, one in call.items()}, tmp_path / "in.st")
    one = found(compared(tiny_nvfp4, "--inputs", tmp_path / "in.st"))["checkpoints"][0]
    assert one["aggregate"]["cosine"]["n"] == 2
    model: Any = FluxTransformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.bfloat16)
    wide = {name: one.bfloat16() if one.ndim > 1 else one for name, one in calls[1].items()}
    with torch.inference_mode():
        base = model(**wide, return_dict=False)[0].double().flatten()
        made = independent_pipeline(tiny_nvfp4).transformer(**wide, return_dict=False)[0].double().flatten()
    cosine = float(base @ made / (base.norm() * made.norm()))
    assert 1 - one["images"][1]["cosine"] == pytest.approx(1 - cosine, rel=0.05)


@pytest.mark.parametrize(("limit", "exit_code"), [("0.5", 0), ("0.99999", 1)])
def test_what_is_required_decides(limit: str, exit_code: int, tiny_nvfp4: Path) -> None:
    outcome = compared(tiny_nvfp4, "--seeds", "8", "--require", f"cosine>={limit}, rmse<=100")
    assert outcome.exit_code == exit_code and outcome.report is not None
    (one,) = outcome.report["checkpoints"]
    assert [each["met"] for each in one["required"]] == [not exit_code, True]
    assert one["required"][0]["bound"] == one["aggregate"]["cosine"]["lower95"]
    assert one["required"][1]["bound"] == one["aggregate"]["rmse"]["upper95"]
    assert outcome.error_code == ("fidelity.below" if exit_code else None)


def test_too_few_pairs_decide_nothing(tiny_nvfp4: Path) -> None:
    outcome = compared(tiny_nvfp4, "--seeds", "1", "--require", "cosine>=0.1")
    assert outcome.exit_code == 6 and outcome.error_code == "fidelity.few_pairs"


def test_an_emulation_that_is_wrong_compares_nothing(tiny_nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "multiply", lambda one, other: (one @ other.t()).float())
    outcome = compared(tiny_nvfp4, "--seeds", "1")
    assert outcome.exit_code == 7 and outcome.error_code == "fidelity.self_test"


def other_pipeline(folder: Path) -> Path:
    (folder / "pipeline").mkdir()
    index = json.loads((FOLDER / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return folder / "pipeline"


def test_a_pipeline_of_another_model_is_refused(tiny_nvfp4: Path, prompts: Path, tmp_path: Path) -> None:
    words = ("--base", FOLDER, "--prompts", prompts, *LOOK)
    outcome = run_mopt("compare", tiny_nvfp4, *words, "--pipeline", other_pipeline(tmp_path))
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.other_model"
    (tmp_path / "empty").mkdir()
    outcome = run_mopt("compare", tiny_nvfp4, *words, "--pipeline", tmp_path / "empty")
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.missing"


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "prompts.missing"), (b"\n \n", "prompts.none"), (b"a \xff", "prompts.not_text")],
)
def test_no_prompts_are_refused(content: bytes | None, code: str, tiny_nvfp4: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = compared(tiny_nvfp4, prompts=path)
    assert outcome.exit_code == 3 and outcome.error_code == code


def _other_values(tensors: Tensors) -> None:
    draw = torch.Generator().manual_seed(1)
    for one in tensors.values():
        if one.dtype == torch.uint8:
            one.copy_(torch.randint(0, 255, one.shape, generator=draw))


def _not_a_number(tensors: Tensors) -> None:
    tensors["x_embedder.bias"][0] = torch.nan


def _invented(tensors: Tensors) -> None:
    tensors["invented.weight"] = torch.zeros(2)


def _lost(tensors: Tensors) -> None:
    del tensors["x_embedder.bias"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_other_values, "fidelity.other_base"),
        (_not_a_number, "fidelity.not_finite"),
        (_invented, "fidelity.tensors"),
        (_lost, "fidelity.tensors"),
    ],
)
def test_a_checkpoint_that_is_not_the_bases_is_refused(
    change: Callable[[Tensors], None], code: str, tiny_nvfp4: Path, tmp_path: Path
) -> None:
    damaged = edit(tiny_nvfp4, tmp_path / "out", change)
    outcome = compared(damaged, "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == code, outcome.stderr


def test_activations_that_are_no_numbers_are_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    base = edit(FOLDER, tmp_path / "base", _not_a_number)
    outcome = compared(tiny_nvfp4, "--seeds", "1", base=base)
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.not_finite"
    assert "the base: module 'x_embedder': expected finite outputs" in outcome.message


def test_a_module_that_never_ran_is_named(tiny_nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    right = FluxTransformer2DModel.forward

    def without_the_last(self: Any, *words: Any, **named: Any) -> Any:
        blocks = self.single_transformer_blocks
        try:
            self.single_transformer_blocks = blocks[:-1]
            return right(self, *words, **named)
        finally:
            self.single_transformer_blocks = blocks

    monkeypatch.setattr(FluxTransformer2DModel, "forward", without_the_last)
    outcome = compared(tiny_nvfp4, "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.never_ran"
    assert "single_transformer_blocks.3" in outcome.message


def test_static_scales_that_are_not_there_are_refused(tiny_nvfp4: Path) -> None:
    outcome = compared(tiny_nvfp4, "--seeds", "1", "--rule", "static")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.no_input_scale"


@pytest.mark.parametrize(
    "names",
    [("x.hidden_states",), ("1.hidden_states",), ("hidden_states",)],
    ids=["no number", "no first call", "arguments missing"],
)
def test_inputs_that_cannot_be_run_are_refused(names: tuple[str, ...], tiny_nvfp4: Path, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1, 4, 16) for name in names}, tmp_path / "in.safetensors")
    outcome = compared(tiny_nvfp4, "--inputs", tmp_path / "in.safetensors")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.inputs"


def test_inputs_that_are_no_safetensors_are_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"no")
    outcome = compared(tiny_nvfp4, "--inputs", tmp_path / "in")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.inputs"


def test_a_class_that_diffusers_has_not_is_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    def renamed(config: dict[str, Any]) -> None:
        config["_class_name"] = "NoTransformer"

    base = edit(FOLDER, tmp_path / "base", change_config=renamed)
    out = edit(tiny_nvfp4, tmp_path / "out", change_config=renamed)
    outcome = compared(out, "--seeds", "1", base=base)
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.class"


@pytest.mark.parametrize(
    "words",
    [
        "--pipeline x",
        "--prompts x",
        "--pipeline x --prompts y --inputs z",
        "--offload model",
        "--pipeline x --prompts y --offload model --device cpu",
        "--require psnr>=20",
        "--require cosine<=0.5",
        "--require cosine",
        "--require cosine>=x",
        "--require beauty>=3",
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(words: str, tmp_path: Path) -> None:
    outcome = run_mopt("compare", tmp_path, "--base", tmp_path, *words.split())
    assert outcome.exit_code == 2 and outcome.report is not None
    assert outcome.report["schema"] == "mopt.fidelity/1" and outcome.error_code == "usage"


def test_what_is_not_installed_is_named(tiny_nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    outcome = compared(tiny_nvfp4, "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.not_installed"
    assert "modelopt-convert[fidelity]" in outcome.message


def test_a_pipeline_that_cannot_be_loaded_or_run_is_refused(
    tiny_nvfp4: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model_index.json").write_bytes((FOLDER / "model_index.json").read_bytes())
    words = ("compare", tiny_nvfp4, "--base", FOLDER, "--prompts", prompts, "--device", "cpu", "--seeds", "1")
    outcome = run_mopt(*words, "--pipeline", tmp_path / "part", "--size", "32")
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.load"
    monkeypatch.setattr(FluxPipeline, "prepare_latents", full)
    outcome = run_mopt(*words, "--pipeline", FOLDER, "--size", "32")
    assert outcome.exit_code == 3 and outcome.error_code == "pipeline.run" and "out of memory" in outcome.message


def test_scales_in_a_layout_that_cannot_be_are_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    out = edit(tiny_nvfp4, tmp_path / "out", change_config=lambda config: config["quantization_config"].update(
        checkpoint_weight_scale_layout="swizzled"
    ))  # fmt: skip
    outcome = compared(out, "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.layout"


def test_a_quantized_module_that_the_class_has_not_is_refused(tiny_nvfp4: Path, tmp_path: Path) -> None:
    def invented(tensors: Tensors) -> None:
        for role in ("weight", "weight_scale", "weight_scale_2"):
            tensors[f"invented.{role}"] = tensors[f"{MODULE}.{role}"].clone()

    outcome = compared(edit(tiny_nvfp4, tmp_path / "out", invented), "--seeds", "1")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.module"
    assert "invented" in outcome.message


def test_checkpoints_have_the_same_transformers(tiny_nvfp4: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        for folder, source in (("out", tiny_nvfp4), ("base", FOLDER / "transformer")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).symlink_to(source)
    outcome = compared(tmp_path / "out", "--seeds", "1", base=tmp_path / "base")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.parts"
    one = tmp_path / "one"
    one.mkdir()
    (one / "transformer").symlink_to(tiny_nvfp4)
    outcome = compared(tmp_path / "out", one, "--seeds", "1", base=tmp_path / "base")
    assert outcome.exit_code == 3 and outcome.error_code == "fidelity.parts" and "other checkpoint" in outcome.message
