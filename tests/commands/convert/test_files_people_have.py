"""Files as people have them: scaled FP8 in every spelling, whole checkpoints, native bases, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import errors_in
from dialect_files import nunchaku
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import Outcome, Tensors, config_of, load, run_mopt, same_bits

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.renaming import under_native_names
from modelopt_convert.families.family import Spelling
from modelopt_convert.families.table import recognise
from modelopt_convert.families.wan import WAN

COMFYUI = "model.diffusion_model."
TORCH = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


def native(transformer: Path, spelling: Spelling = "comfyui", prefix: str = "") -> Tensors:
    """A transformer whose tensors are renamed, and joined where names are; nothing else changes."""
    with CheckpointReader(transformer) as reader:
        found = recognise({name: info.shape for name, info in reader.tensors.items()})
        assert found is not None
        named = under_native_names(Canonical(reader.tensors, {}, {}), found.family, spelling, prefix)
        return {
            name: torch.frombuffer(bytearray(reader.read_of(info, 0, info.num_bytes)), dtype=TORCH[info.dtype])
            .reshape(info.shape)
            .clone()
            for name, info in named.tensors.items()
        }


def written(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def convert(source: Path, output: Path, to: str, *more: str | Path) -> Outcome:
    outcome = run_mopt("convert", source, output, "--to", to, *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return outcome


def marker(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


@pytest.fixture
def scaled(families: Path, tmp_path: Path) -> Tensors:
    """Wan in FP8 under ComfyUI's names, with scales in its newer spelling and no marker."""
    convert(families / "wan" / "fp8", tmp_path / "comfyui", "comfyui")
    found = load(tmp_path / "comfyui")
    return {name: tensor for name, tensor in found.items() if not name.endswith(".comfy_quant")}


def modules(tensors: Tensors) -> list[str]:
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def legacy(sentinel: torch.Tensor) -> Callable[[Tensors], Tensors]:
    def make(tensors: Tensors) -> Tensors:
        names = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
        old = {f"{name.rpartition('.')[0]}.{names[role]}": one for name, one in tensors.items()
               if (role := name.rpartition(".")[2]) in names}  # fmt: skip
        plain = {name: one for name, one in tensors.items() if name.rpartition(".")[2] not in names}
        return {**plain, **old, "scaled_fp8": sentinel}

    return make


def marked(tensors: Tensors) -> Tensors:
    return tensors | {f"{name}.comfy_quant": marker('{"format": "float8_e4m3fn"}') for name in modules(tensors)}


def header(tensors: Tensors) -> dict[str, str]:
    layers = {name: {"format": "float8_e4m3fn"} for name in modules(tensors)}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "sentinel of FP8": legacy(torch.zeros(0, dtype=torch.float8_e4m3fn)),
    "sentinel of two elements": legacy(torch.zeros(2, dtype=torch.float8_e4m3fn)),
    "sentinel of F32": legacy(torch.zeros(0)),
    "markers": marked,
    "header": dict,
    "nothing": dict,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_scaled_fp8_is_the_export_again(
    spelling: str, scaled: Tensors, families: Path, tmp_path: Path
) -> None:
    """ModelOpt's tensors, to the byte; and in BF16 what ComfyUI computes with: codes times scale."""
    base = families / "wan" / "base"
    file = written(SPELLINGS[spelling](scaled), tmp_path / "it" / "wan.safetensors",
                   header(scaled) if spelling == "header" else None)  # fmt: skip
    convert(file, tmp_path / "modelopt", "modelopt", "--config", base)
    same(load(families / "wan" / "fp8" / "transformer"), load(tmp_path / "modelopt"))
    convert(file, tmp_path / "bf16", "bf16", "--config", base)
    found, export = load(tmp_path / "bf16"), load(tmp_path / "modelopt")
    for name in modules(export):
        meant = export[f"{name}.weight"].float() * export[f"{name}.weight_scale"]
        assert torch.equal(found[f"{name}.weight"], meant.bfloat16()), name
    built = run_mopt("convert-fp8", "--export", tmp_path / "modelopt", "--base", base, "--output", tmp_path / "built")
    assert built.exit_code == 0, built.stderr


@pytest.mark.parametrize("kind", ["rows", "BF16 scales", "plain cast"])
def test_other_scales_of_fp8_are_widened_and_keep_their_values(
    kind: str, scaled: Tensors, families: Path, tmp_path: Path
) -> None:
    tensors, meant = dict(scaled), {}
    for name in modules(scaled):
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        if kind == "rows":
            values = weight.float() * scale
            scale = values.abs().amax(1, keepdim=True) / 448
            weight = (values / scale).to(torch.float8_e4m3fn)
        elif kind == "BF16 scales":
            scale = scale.bfloat16()
        else:
            scale = torch.tensor(1.0)
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scale}
        (ours,) = WAN.fused(name)
        meant[ours] = weight.float() * scale.float()
    if kind == "plain cast":
        tensors = {name: one for name, one in tensors.items() if not name.endswith("_scale")}
    file = written(marked(tensors), tmp_path / "it" / "wan.safetensors")
    for to in ("modelopt", "bf16"):
        convert(file, tmp_path / to, to, "--config", families / "wan" / "base")
    plain, export = load(tmp_path / "bf16"), load(tmp_path / "modelopt")
    for name, values in meant.items():
        scale = export[f"{name}.weight_scale"]
        assert scale.dtype == torch.float32
        assert torch.equal(export[f"{name}.weight"].float() * scale.reshape(-1, 1), values)
        assert torch.equal(plain[f"{name}.weight"], values.bfloat16())


@pytest.mark.parametrize(("family", "algorithm"), [("wan", "nvfp4"), ("flux2", "nvfp4"), ("ltx2", "fp8")])
def test_a_whole_file_is_converted_against_a_whole_base(
    family: str, algorithm: str, families: Path, tmp_path: Path
) -> None:
    """A VAE, connectors and all: what is left out is said and in the ledger, and the transformer is proven."""
    export = families / family / algorithm
    beside = {"first_stage_model.x.weight": torch.ones(4, 4), "text_encoders.t5xxl.y.weight": torch.ones(2)}
    if family == "ltx2":
        beside = {"vae.x.weight": torch.ones(4), "audio_vae.y": torch.ones(2), "vocoder.z": torch.ones(2),
                  f"{COMFYUI}video_embeddings_connector.learnable_registers": torch.ones(2, 2)}  # fmt: skip
    base = written(
        native(families / family / "base" / "transformer", prefix=COMFYUI) | beside, tmp_path / "b.safetensors"
    )
    there = convert(export, tmp_path / "there", "comfyui", "--base", base)
    assert there.report is not None and there.report["convert"]["proven"]
    inner = load(tmp_path / "there")
    whole = {f"{COMFYUI}{name}": tensor for name, tensor in inner.items()} | beside
    file = written(whole, tmp_path / "whole" / "it.safetensors")
    for to in ("modelopt", "comfyui"):
        more = ["--config", families / family / "base"] if to == "modelopt" else []
        done = convert(file, tmp_path / to, to, "--base", base, *more)
        assert done.report is not None and done.report["convert"]["proven"]
        assert {one["code"] for one in done.report["warnings"]} >= {"input.read_as", "input.left_out"}
        fates = done.report["ledger"]["source"]
        assert fates.keys() == whole.keys()
        assert {name for name in beside if fates[name].startswith("left out: the ") or "a text enc" in fates[name]} == {
            *beside
        }
    same(inner, load(tmp_path / "comfyui"))
    model = {name: one for name, one in load(export / "transformer").items() if "_quantizer." not in name}
    same(model, load(tmp_path / "modelopt"))


@pytest.fixture
def x0(families: Path, tmp_path: Path) -> Path:
    """An LTX-2 export as ltx-core's ``X0Model`` saves it: the model's own names in ``velocity_model``."""
    transformer = families / "ltx2" / "fp8" / "transformer"
    folder = tmp_path / "x0"
    written(native(transformer, "original", "velocity_model."), folder / "model.safetensors")
    said = config_of(transformer)["quantization_config"]
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "X0Model", "quantization_config": {**said, "ignore": []}})
    )
    return folder


def test_an_x0_model_gets_the_config_of_its_base(x0: Path, families: Path, tmp_path: Path) -> None:
    base = families / "ltx2" / "base"
    for to in ("modelopt", "comfyui"):
        done = convert(x0, tmp_path / to, to, "--base", base)
        assert done.report is not None and done.report["convert"]["proven"]
        assert "config.not_compared" in {one["code"] for one in done.report["warnings"]}
    assert config_of(tmp_path / "modelopt")["_class_name"] == "LTX2VideoTransformer3DModel"
    same(load(families / "ltx2" / "fp8" / "transformer"), load(tmp_path / "modelopt"))


def test_an_x0_model_alone_has_no_config_that_diffusers_reads(x0: Path, tmp_path: Path) -> None:
    refused = run_mopt("convert", x0, tmp_path / "out", "--to", "modelopt")
    assert refused.exit_code == 3 and refused.error_code == "convert.config" and "X0Model" in refused.message
    convert(x0, tmp_path / "comfyui", "comfyui")


def test_a_model_in_black_forest_labs_names_is_a_base(families: Path, tmp_path: Path) -> None:
    base = families / "flux1" / "base"
    one = written(native(base / "transformer", "original"), tmp_path / "flux1-dev-finetune.safetensors")
    done = run_mopt(
        "build-nvfp4", "--export", families / "flux1" / "nvfp4", "--base", one, "--output", tmp_path / "out"
    )
    assert done.exit_code == 0 and done.report is not None and done.report["proof"]["status"] == "pass", done.stderr
    assert run_mopt("verify", tmp_path / "out", "--base", one).exit_code == 0


QKV = "double_blocks.0.img_attn.qkv"
Change = Callable[[Tensors], Tensors]
CHANGES: dict[str, Change] = {
    "two transformers": lambda flux: flux | {f"{COMFYUI}{name}": one.clone() for name, one in flux.items()},
    "a name that no family has": lambda flux: flux | {"double_blocks.0.strange.weight": torch.ones(2)},
    "a LoRA beside": lambda flux: flux | {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
    "twelve tensors": lambda flux: {name: one for name, one in flux.items() if "img_attn" in name},
    "fused rows cut": lambda flux: flux | {f"{QKV}.weight": flux[f"{QKV}.weight"][:-1]},
    "three fused rows cut": lambda flux: flux | {f"{QKV}.weight": flux[f"{QKV}.weight"][:-3]},
}
SAID = {
    "two transformers": ("naming.several", "FLUX.1"),
    "a name that no family has": ("naming.unknown", "strange"),
    "a LoRA beside": ("naming.unknown", "lora_unet_x"),
    "twelve tensors": ("naming.unknown_model", "img_attn"),
    "fused rows cut": ("family.rows", QKV),
    "three fused rows cut": ("dialect.shape", QKV),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_not_one_whole_transformer_is_one_line(kind: str, families: Path, tmp_path: Path) -> None:
    code, named = SAID[kind]
    base = families / "flux1" / "base"
    file = written(CHANGES[kind](native(base / "transformer")), tmp_path / "in" / "it.safetensors")
    refused = run_mopt("convert", file, tmp_path / "out", "--to", "bf16", "--config", base)
    assert (refused.exit_code, refused.error_code) == (3, code), refused.stderr
    (line,) = errors_in(refused.stderr)
    assert named in line and str(file.parent) in line
    assert not (tmp_path / "out").exists()


def test_nunchaku_of_an_unknown_model_and_a_marker_that_lies_are_one_line(
    scaled: Tensors, families: Path, tmp_path: Path
) -> None:
    refused = run_mopt("convert", nunchaku(tmp_path / "nunchaku"), tmp_path / "out", "--to", "bf16")
    assert (refused.exit_code, refused.error_code) == (3, "naming.unknown_model") and "nunchaku" in refused.message
    lie = scaled | {f"{name}.comfy_quant": marker('{"format": "nvfp4"}') for name in modules(scaled)[:1]}
    file = written(lie, tmp_path / "lie" / "it.safetensors")
    refused = run_mopt("convert", file, tmp_path / "out", "--to", "modelopt", "--config", families / "wan" / "base")
    assert (refused.exit_code, refused.error_code) == (3, "dialect.contradiction") and modules(scaled)[
        0
    ] in refused.message


def test_fp8_scales_of_other_shapes_are_converted_to_those_that_builds_take(exports: Path, tmp_path: Path) -> None:
    source = exports / "fp8" / "transformer"
    plain = load(source)
    for kind, change in {"[1]": lambda one: one.reshape(1), "BF16": lambda one: one.bfloat16()}.items():
        folder = tmp_path / kind / "transformer"
        tensors = {name: change(one) if name.endswith("_scale") else one for name, one in plain.items()}
        written(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        convert(folder.parent, tmp_path / f"{kind}-out", "modelopt")
        for name, one in load(tmp_path / f"{kind}-out").items():
            wanted = tensors[name].float().reshape(()) if name.endswith("_scale") else tensors[name]
            assert same_bits(one, wanted), name


def test_a_module_without_input_scale_goes_to_comfyui_alone(families: Path, tmp_path: Path) -> None:
    source = families / "wan" / "fp8" / "transformer"
    tensors = load(source)
    tensors.pop(next(name for name in tensors if name.endswith(".input_scale")))
    written(tensors, tmp_path / "it" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "it" / "config.json").write_bytes((source / "config.json").read_bytes())
    refused = run_mopt("convert", tmp_path / "it", tmp_path / "out", "--to", "modelopt")
    assert (refused.exit_code, refused.error_code) == (3, "convert.no_input_scale")
    convert(tmp_path / "it", tmp_path / "out", "comfyui")
    assert sum(name.endswith(".input_scale") for name in load(tmp_path / "out")) == len(modules(tensors)) - 1


def test_a_quantized_base_is_called_that(families: Path, tmp_path: Path) -> None:
    export = families / "wan" / "nvfp4"
    refused = run_mopt("convert", export, tmp_path / "out", "--to", "comfyui", "--base", export)
    assert (refused.exit_code, refused.error_code) == (3, "base.quantized"), refused.stderr


@pytest.mark.parametrize("spelling", ["sentinel of FP8", "markers", "nothing"])
@given(lost=st.sets(st.integers(0, 9), min_size=1, max_size=3))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_weight_that_lost_its_scale_among_scaled_ones_is_refused(
    spelling: str, lost: set[int], scaled: Tensors, families: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As a plain cast its values would be off by hundreds, and nothing would say so."""
    folder, names = tmp_path_factory.mktemp("lost"), modules(scaled)
    tensors = SPELLINGS[spelling](scaled)
    bare = [names[index % len(names)] for index in sorted(lost)]
    for name in bare:
        tensors = {key: one for key, one in tensors.items() if not key.startswith(f"{name}.") or "scale" not in key}
    file = written(tensors, folder / "wan.safetensors")
    for to in ("modelopt", "comfyui", "bf16"):
        refused = run_mopt("convert", file, folder / to, "--to", to, "--config", families / "wan" / "base")
        assert refused.exit_code == 3 and refused.error_code == "dialect.unscaled" and not (folder / to).exists()
        assert f"{bare[0]}.weight" in refused.message


def test_a_plain_cast_is_told(scaled: Tensors, families: Path, tmp_path: Path) -> None:
    file = written({k: v for k, v in scaled.items() if "_scale" not in k}, tmp_path / "it" / "wan.safetensors")
    done = convert(file, tmp_path / "out", "bf16", "--config", families / "wan" / "base")
    assert done.report is not None
    told = [one["message"] for one in done.report["warnings"] if one["code"] == "convert.unscaled"]
    assert len(told) == 1 and told[0].startswith(f"{len(modules(scaled))} FP8 weights have no scale")


def test_a_config_of_another_model_is_refused_where_a_record_has_one_too(families: Path, tmp_path: Path) -> None:
    convert(families / "wan" / "nvfp4", tmp_path / "there", "comfyui")
    for to in ("modelopt", "comfyui"):
        refused = run_mopt(
            "convert", tmp_path / "there", tmp_path / to, "--to", to, "--config", families / "flux2" / "base"
        )
        assert refused.exit_code == 3 and refused.error_code == "convert.config"
        assert "Flux2Transformer2DModel" in refused.message and not (tmp_path / to).exists()


def test_an_input_scale_of_one_by_one_is_one_scale(scaled: Tensors, families: Path, tmp_path: Path) -> None:
    odd = {name: one.reshape(1, 1) if name.endswith("input_scale") else one for name, one in scaled.items()}
    file = written(odd, tmp_path / "it" / "wan.safetensors")
    convert(file, tmp_path / "out", "modelopt", "--config", families / "wan" / "base")
    same(load(families / "wan" / "fp8" / "transformer"), load(tmp_path / "out"))


@pytest.mark.parametrize("ulps", [1, 64, -3])
def test_a_scale_beside_that_of_max_calibration_is_told(
    ulps: int, scaled: Tensors, families: Path, tmp_path: Path
) -> None:
    name = modules(scaled)[0]
    bits = scaled[f"{name}.weight_scale"].reshape(1).view(torch.int32) + ulps
    tensors = scaled | {f"{name}.weight_scale": bits.view(torch.float32).reshape(())}
    file = written(marked(tensors), tmp_path / "it" / "wan.safetensors")
    done = convert(file, tmp_path / "out", "modelopt", "--base", families / "wan" / "base")
    assert done.report is not None
    told = [one["message"] for one in done.report["warnings"] if one["code"] == "proof.scale_factor"]
    assert len(told) == 1 and told[0].startswith("1 modules have a tensor scale that is not max calibration's")
