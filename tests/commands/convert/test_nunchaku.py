"""Whole models of nunchaku through the command: to BF16, loaded by diffusers' classes, and refused elsewhere."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from commands import errors_in
from nunchaku_files import Kind
from nunchaku_models import CONFIGS, Checkpoint, merged, packed, small, two_files
from safetensors.torch import load_file, save_file
from support import Tensors, load, run_mopt
from torch import Tensor

QUANTIZED = {"flux1": 20, "qwen_image": 14, "z_image": 21}
EVERY = pytest.mark.parametrize(("family", "kind"), [("flux1", "int4"), ("qwen_image", "nvfp4"), ("z_image", "int4")])


class Small(NamedTuple):
    """A small model, its folder, and itself as nunchaku has it."""

    model: Any
    base: Path
    config: Mapping[str, Any]
    made: Callable[[Kind], Checkpoint]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Small]:
    found = {}
    for family in CONFIGS:
        model = small(family)
        base = tmp_path_factory.mktemp(family) / "base"
        model.save_pretrained(base)
        state, done = load(base), dict[Kind, Checkpoint]()

        def made(
            kind: Kind, family: str = family, state: Tensors = state, done: dict[Kind, Checkpoint] = done
        ) -> Checkpoint:
            if kind not in done:
                done[kind] = packed(family, state, kind)
            return done[kind]

        found[family] = Small(model, base, json.loads((base / "config.json").read_text()), made)
    return found


def converted(source: Path, output: Path, *more: str | Path) -> dict[str, Any]:
    outcome = run_mopt("convert", source, output, "--to", "bf16", *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return outcome.report


def forward(family: str, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    time = torch.tensor([0.5]).bfloat16()
    with torch.inference_mode():
        if family == "flux1":
            ids = {
                "img_ids": torch.zeros(6, 3),
                "txt_ids": torch.zeros(4, 3),
                "guidance": torch.tensor([1.0]).bfloat16(),
            }
            inputs = {"pooled_projections": random(1, 48), **ids}
        elif family == "qwen_image":
            mask = torch.ones(1, 4, dtype=torch.bool)
            inputs = {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 2, 3)]]}
        else:
            return model([random(4, 1, 4, 6)], time, [random(5, 64)], return_dict=False)[0][0]  # type: ignore[no-any-return]
        return model(  # type: ignore[no-any-return]
            hidden_states=random(1, 6, 16),
            encoder_hidden_states=random(1, 4, 96),
            timestep=time,
            return_dict=False,
            **inputs,
        )[0]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@EVERY
def test_a_whole_model_is_what_the_engine_computes_with(
    models: Mapping[str, Small], tmp_path: Path, family: str, kind: Kind
) -> None:
    """Under diffusers' names; its class loads it, and its forward pass is near that of the original weights."""
    mine, name = models[family], CONFIGS[family][0]
    made = mine.made(kind)
    source = merged(made, tmp_path / "in", mine.config, kind, CONFIGS[family][1])
    report = converted(source, tmp_path / "out", "--base", mine.base)["convert"]
    assert report["from"] == "nunchaku" and report["family"] == family and "near the base" in report["words"]
    assert report["modules"] == dict.fromkeys(report["modules"], 0) | {"bf16": QUANTIZED[family]}
    assert len(report["lossy"]) == QUANTIZED[family] and not report["proven"] and not report["restorable"]
    assert all(0 < one["rel_error"] < 0.004 and one["how"] == "bf16" for one in report["lossy"])
    found, originals = load(tmp_path / "out"), load(mine.base)
    assert found.keys() == originals.keys()
    for tensor, value in found.items():
        wanted = made.meant[tensor]
        assert value.shape == wanted.shape and value.dtype == originals[tensor].dtype
        assert torch.allclose(value.double(), wanted, rtol=2**-7.9, atol=1e-5), tensor
    model = getattr(diffusers, name).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    exact = getattr(diffusers, name).from_config(mine.config).bfloat16()
    exact.load_state_dict({tensor: value.to(originals[tensor].dtype) for tensor, value in made.meant.items()})
    result = forward(family, model.eval())
    assert torch.isfinite(result).all()
    assert apart(result, forward(family, exact.eval())) < 0.02
    assert apart(result, forward(family, mine.model)) < 0.25


def test_the_folder_of_two_files_is_the_same_checkpoint(models: Mapping[str, Small], tmp_path: Path) -> None:
    mine = models["flux1"]
    made = mine.made("nvfp4")
    config = {**mine.config, "_class_name": "NunchakuFluxTransformer2DModelV2"}
    folder = two_files(made, tmp_path / "folder", config)
    converted(folder, tmp_path / "out")
    converted(merged(made, tmp_path / "in", config, "nvfp4", config["_class_name"]), tmp_path / "one")
    left, right = load(tmp_path / "out"), load(tmp_path / "one")
    assert left.keys() == right.keys() and all(torch.equal(one, right[name]) for name, one in left.items())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["_class_name"] == "FluxTransformer2DModel" and "quantization_config" not in said
    diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    (folder / "more.safetensors").write_bytes((folder / "transformer_blocks.safetensors").read_bytes())
    refused = run_mopt("convert", folder, tmp_path / "no", "--to", "bf16")
    assert (refused.exit_code, refused.error_code) == (3, "input.ambiguous")


def test_every_tensor_has_its_fate(models: Mapping[str, Small], tmp_path: Path) -> None:
    mine = models["flux1"]
    made = mine.made("int4")
    source = merged(made, tmp_path / "in", mine.config, "int4", "NunchakuFluxTransformer2dModel")
    ledger = converted(source, tmp_path / "out")["ledger"]["source"]
    assert ledger.keys() == made.tensors.keys()
    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    qkv = ", ".join(f"{block}.attn.to_{one}.weight" for one in "qkv")
    assert ledger[f"{block}.qkv_proj.lora_up"] == f"decoded into {qkv}"
    assert "does not look at it" in ledger[f"{block}.out_proj.smooth_orig"]
    assert "without the shift" in ledger[f"{single}.mlp_fc2.bias"] and "shift" not in ledger[f"{single}.out_proj.bias"]
    assert "without the 1" in ledger[f"{block}.norm1.linear.bias"]
    assert ledger[f"{block}.norm_q.weight"] == f"read as {block}.attn.norm_q.weight"


def test_refiners_that_the_engine_leaves_plain(models: Mapping[str, Small], tmp_path: Path) -> None:
    """``skip_refiners``: their attention has diffusers' names, and their w3 and w1 are one all the same."""
    mine = models["z_image"]
    originals, tensors = load(mine.base), dict(mine.made("int4").tensors)
    for name in [one for one in tensors if "refiner" in one]:
        del tensors[name]
    for name, one in originals.items():
        if "refiner" in name and ".feed_forward." not in name:
            tensors[name] = one
        elif "refiner" in name and name.endswith("w1.weight"):
            front = name.removesuffix("w1.weight")
            tensors[f"{front}net.0.proj.weight"] = torch.cat((originals[f"{front}w3.weight"], one))
            tensors[f"{front}net.2.weight"] = originals[f"{front}w2.weight"]
    made = Checkpoint(tensors, {})
    source = merged(made, tmp_path / "in", mine.config, "int4", "NunchakuZImageTransformer2DModel")
    assert converted(source, tmp_path / "out", "--base", mine.base)["convert"]["modules"]["bf16"] == 7
    found = load(tmp_path / "out")
    assert found.keys() == originals.keys()
    assert all(torch.equal(one, found[name]) for name, one in originals.items() if "refiner" in name)


def test_the_gate_of_z_image_is_where_the_engine_has_it() -> None:
    """The engine puts diffusers' SwiGLU in the place of Z-Image's own module: the two agree on which half is which."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.transformers.transformer_z_image import FeedForward as Own

    torch.manual_seed(0)
    own, theirs = Own(8, 16), FeedForward(8, dim_out=8, activation_fn="swiglu", inner_dim=16, bias=False)
    theirs.load_state_dict(
        {"net.0.proj.weight": torch.cat((own.w3.weight, own.w1.weight)), "net.2.weight": own.w2.weight}
    )
    inputs = torch.randn(3, 8)
    assert torch.allclose(own(inputs), theirs(inputs), atol=1e-6)


@pytest.mark.parametrize("target", ["comfyui", "modelopt", "bfl-diffusers", "torchao", "compressed-tensors"])
def test_other_targets_are_refused_in_one_line_that_names_bf16(
    models: Mapping[str, Small], tmp_path: Path, target: str
) -> None:
    mine = models["qwen_image"]
    source = merged(mine.made("int4"), tmp_path / "in", mine.config, "int4", "X")
    refused = run_mopt("convert", source, tmp_path / "out", "--to", target, "--inexact", "requantize")
    assert (refused.exit_code, refused.error_code) == (3, "convert.no_place")
    (line,) = errors_in(refused.stderr)
    assert target in line and "bf16" in line
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_another_is_refused(models: Mapping[str, Small], tmp_path: Path) -> None:
    """Also where the smoothing of an attention's output is a part of v: one matrix of twenty is another."""
    mine = models["flux1"]
    source = merged(mine.made("int4"), tmp_path / "in", mine.config, "int4", "X")
    name = "transformer_blocks.0.attn.to_v"
    tensors = load_file(mine.base / "diffusion_pytorch_model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].roll(1, 0)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps(mine.config))
    run = run_mopt("convert", source, tmp_path / "out", "--to", "bf16", "--base", tmp_path / "base")
    assert run.exit_code == 1 and "check.proof" in run.stderr and "1 of 20" in run.stderr and name in run.stderr
    assert not (tmp_path / "out").exists()


def test_damage_is_one_line_with_a_code(models: Mapping[str, Small], tmp_path: Path) -> None:
    mine = models["flux1"]
    tensors = dict(mine.made("int4").tensors)
    del tensors["transformer_blocks.0.mlp_fc1.wscales"]
    source = merged(Checkpoint(tensors, {}), tmp_path / "in", mine.config, "int4", "X")
    refused = run_mopt("convert", source, tmp_path / "out", "--to", "bf16")
    assert (refused.exit_code, refused.error_code) == (3, "dialect.role")
    assert "transformer_blocks.0.mlp_fc1" in refused.message and "wscales is missing" in refused.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "IT"),
        ("build-nvfp4", "--preset", "flux1-dev", "--export", "IT", "--base", "BASE", "--output", "OUT"),
        ("build-nvfp4", "--preset", "flux1-dev", "--base", "IT", "--output", "OUT"),
    ],
)
def test_what_builds_and_proves_refuses_it(
    models: Mapping[str, Small], tmp_path: Path, command: tuple[str, ...]
) -> None:
    mine = models["flux1"]
    source = merged(mine.made("int4"), tmp_path / "in", mine.config, "int4", "X")
    places = {"IT": source, "BASE": mine.base, "OUT": tmp_path / "out"}
    refused = run_mopt(*(str(places.get(word, word)) for word in command))
    (line,) = errors_in(refused.stderr)
    assert (refused.exit_code, refused.error_code) == (3, "dialect.formats") and "found nunchaku" in line
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_no_weights(models: Mapping[str, Small], tmp_path: Path) -> None:
    mine = models["flux1"]
    source = merged(mine.made("int4"), tmp_path / "in", mine.config, "int4", "X")
    report = converted(source, tmp_path / "out", "--dry-run")["convert"]
    assert report["modules"]["bf16"] == 20 and {one["rel_error"] for one in report["lossy"]} == {None}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["wtscale", "wcscales", "lora_up"])
def test_what_others_of_a_kind_have_is_not_taken_for_one_or_nothing(
    models: Mapping[str, Small], tmp_path: Path, role: str
) -> None:
    mine = models["flux1"]
    tensors = dict(mine.made("nvfp4").tensors)
    names = [name for name in tensors if name.endswith(f".{role}")]
    lost = sorted(names)[len(names) // 2].removesuffix(f".{role}")
    for one in (role, *(["lora_down"] if role == "lora_up" else [])):
        del tensors[f"{lost}.{one}"]
    source = merged(Checkpoint(tensors, {}), tmp_path / "in", mine.config, "nvfp4", "X")
    refused = run_mopt("convert", source, tmp_path / "out", "--to", "bf16")
    assert (refused.exit_code, refused.error_code) == (3, "dialect.unscaled") and lost in refused.message


def test_a_header_of_another_kind_is_a_contradiction(models: Mapping[str, Small], tmp_path: Path) -> None:
    mine = models["flux1"]
    for kind, said in (("nvfp4", "int4"), ("int4", "nvfp4")):
        source = merged(mine.made(kind), tmp_path / kind, mine.config, said, "X")  # type: ignore[arg-type]
        refused = run_mopt("convert", source, tmp_path / f"out-{kind}", "--to", "bf16")
        assert (refused.exit_code, refused.error_code) == (3, "dialect.contradiction"), refused.stderr
