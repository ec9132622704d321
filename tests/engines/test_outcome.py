"""What engines make of files of all dialects, against their own code: SGLang's, diffusers' and comfy-kitchen's."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import diffusers as engine
import pytest
import torch
import torchao.prototype.mx_formats
import torchao.quantization
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, TensorCoreNVFP4Layout
from dialect_files import CLASS, EVEN, MAKERS, ODD, SHAPES, comfyui_fp8_legacy, write_file
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.bfl.utils import BFLFP8RLinear, dequantize_nvfp4
from faults import swap, swizzle
from kit import build
from root import ROOT
from safetensors.torch import load_file, save_file
from support import Tensors, load

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.engines import comfyui, diffusers, sglang_files, vllm_omni
from modelopt_convert.engines.outcome import HALVED, UNSCALED, Reading, is_quantized
from modelopt_convert.formats.layout import CANONICAL
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4 as ours
from modelopt_convert.inspection.every_engine import legacy_ones, markers_of

SGLANG = ROOT / ".venv" / "engines" / "sglang" / "bin" / "python"
NATIVE = {"txt_norm.weight": torch.ones(8), "img_in.weight": torch.ones(8, 8)}  # by which ComfyUI knows Qwen-Image


def of_comfyui(source: Path) -> Reading:
    with CheckpointReader(source, need_config=False) as reader:
        return comfyui.read(reader.tensors, reader.metadata, markers_of(reader), legacy_ones(reader))


def of_diffusers(source: Path) -> Reading:
    with CheckpointReader(source, need_config=False) as reader:
        return diffusers.read(reader.tensors, reader.config, is_file=source.is_file())


def marked(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.skipif(not SGLANG.exists(), reason="`make test` sets SGLang up; here it is not")
def test_sglang_settles_on_what_is_said(tmp_path: Path) -> None:
    sources = {maker.__name__: maker(tmp_path / maker.__name__) for _, maker in MAKERS}
    folders = [str(tmp_path / name) for name in sources]
    around = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(SGLANG), str(ROOT / "tests/support/sglang_resolver.py"), str(ROOT / "scripts/engines"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=around, check=True)
    settled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert [one["folder"] for one in settled] == list(sources)
    compared = 0
    for one in settled:
        source = sources[one["folder"]]
        with CheckpointReader(source, need_config=False) as reader:
            if not is_quantized(reader.tensors):
                assert one["config"] == "NoneType"
                continue
            found = sglang_files.read(reader.tensors, reader.metadata, reader.config, is_file=source.is_file())
        compared += 1
        if "raises" in one:
            told = f"raises {one['raises']}" == found.how or found.how.startswith("refuses quant_algo")
            assert (found.outcome == "refuses" and told) or one["folder"] == "nunchaku", (one, found)
        elif found.layout is not None:
            # Padded scales are refused later, by shape: a test with SGLang's own loader shows it.
            assert one["config"] == "ModelOptFp4Config"
            assert one["swap_weight_nibbles"] == (found.layout.nibbles == "high")
            assert (one["checkpoint_weight_scale_layout"] == "swizzled") == (found.layout.scales == "128x4")
        elif found.outcome == "misreads":
            assert (one["config"], one["activation_scheme"]) == ("Fp8Config", "dynamic") and "dynamically" in found.how
            assert one["ignored_layers"] == []  # every Linear
        else:
            assert one["config"] in ("ModelOptFp8Config", "Fp8Config", "Mxfp4Config") and found.outcome == "unknown"
    assert compared >= 25


@pytest.mark.parametrize(("dialect", "maker"), MAKERS, ids=lambda item: getattr(item, "__name__", item))
def test_diffusers_raises_what_is_said(tmp_path: Path, dialect: str, maker: Any) -> None:
    source = maker(tmp_path / "made")
    found = of_diffusers(source)
    if source.is_file() or dialect == "unquantized":
        return
    keys = json.loads((source / "config.json").read_text())["quantization_config"]
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        DiffusersAutoQuantizer.from_dict(dict(keys))
    assert found.outcome == "refuses" and found.how.startswith(f"raises {caught.type.__name__}")
    # A method that it does have needs no refusal: its quantizers are those that are named.
    assert diffusers.read({}, {"quantization_config": {"quant_method": "quanto"}}, is_file=False).outcome == "unknown"


@pytest.fixture(scope="module")
def qwen(families: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen-Image, whose native names are diffusers': folders that declare nothing, by format."""
    root, found = tmp_path_factory.mktemp("qwen"), {}
    for form in ("nvfp4", "fp8"):
        built = build(families, "qwen_image", form, root)
        found[form] = root / f"bare-{form}"
        found[form].mkdir()
        config = json.loads((built / "config.json").read_text())
        del config["quantization_config"]
        (found[form] / "config.json").write_text(json.dumps(config))
        save_file(load(built), found[form] / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return found


def weights_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def test_diffusers_takes_fp8_that_is_not_declared_for_weights(qwen: dict[str, Path]) -> None:
    found = of_diffusers(qwen["fp8"])
    assert found.outcome == "misreads" and len(found.modules[UNSCALED]) == 44
    model = engine.QwenImageTransformer2DModel.from_pretrained(qwen["fp8"], torch_dtype=torch.bfloat16)
    held, stored = model.state_dict(), load_file(weights_of(qwen["fp8"]))
    for module in found.modules[UNSCALED]:
        assert torch.equal(held[f"{module}.weight"].float(), stored[f"{module}.weight"].float())


def test_diffusers_refuses_nvfp4_that_is_not_declared(qwen: dict[str, Path]) -> None:
    found = of_diffusers(qwen["nvfp4"])
    assert found.outcome == "refuses" and len(found.modules[HALVED]) == 48
    with pytest.raises(ValueError, match="expected shape"):
        engine.QwenImageTransformer2DModel.from_pretrained(qwen["nvfp4"], torch_dtype=torch.bfloat16)


def by_bfl(folder: Path, source: Path) -> Any:
    return engine.QwenImageTransformer2DModel.from_single_file(
        str(source),
        config=str(folder),
        torch_dtype=torch.bfloat16,
        quantization_config=engine.BFLQuantizationConfig(),
    )


def test_diffusers_reads_one_file_by_bfl_low_and_row_by_row(qwen: dict[str, Path], tmp_path: Path) -> None:
    """The right file is held to the last bit, and ComfyUI's file of the same weights wrong, without a word."""
    plain = load_file(weights_of(qwen["nvfp4"]))
    found = of_diffusers(weights_of(qwen["nvfp4"]))
    assert found.outcome == "reads" and found.layout == CANONICAL and found.depends
    modules = [name.removesuffix(".weight_scale_2") for name in plain if name.endswith(".weight_scale_2")]
    other = plain | {f"{module}.weight": swap(plain[f"{module}.weight"]) for module in modules}
    save_file(other, tmp_path / "swapped.safetensors")
    assert of_diffusers(tmp_path / "swapped.safetensors").outcome == "reads"  # what the layout is, no header tells
    # As `mopt convert --to bfl-diffusers` writes it: a folder of one file, for from_single_file too.
    assert of_diffusers(tmp_path) == of_diffusers(tmp_path / "swapped.safetensors")
    for source, agrees in ((weights_of(qwen["nvfp4"]), True), (tmp_path / "swapped.safetensors", False)):
        held = by_bfl(qwen["nvfp4"], source)
        for module in modules:
            linear = held.get_submodule(module)
            decoded = dequantize_nvfp4(linear.weight, linear.weight_scale, linear.weight_scale_2)
            right = ours(*(plain[f"{module}.{role}"] for role in ("weight", "weight_scale", "weight_scale_2")))
            assert torch.equal(decoded, right) == agrees


def test_diffusers_decodes_an_fp8_scale_for_each_row_or_one_in_a_list(qwen: dict[str, Path], tmp_path: Path) -> None:
    plain = load_file(weights_of(qwen["fp8"]))
    scales = [name for name in plain if name.endswith(".weight_scale")]
    for shape, outcome in (("row", "reads"), ((1,), "reads"), ((), "refuses"), ("column", "refuses")):
        changed = dict(plain)
        for name in scales:
            rows = plain[name.removesuffix("_scale")].shape[0]
            wanted = {"row": (rows,), "column": (rows, 1)}.get(str(shape), shape)
            changed[name] = plain[name].flatten()[0].expand(wanted).clone()
        source = tmp_path / f"{shape}.safetensors"
        save_file(changed, source)
        found = of_diffusers(source)
        assert found.outcome == outcome, (shape, found)
        linear = next(one for one in by_bfl(qwen["fp8"], source).modules() if isinstance(one, BFLFP8RLinear))
        inputs = torch.ones(2, linear.in_features, dtype=torch.bfloat16)
        if outcome == "reads":
            assert linear(inputs).shape == (2, linear.out_features)
        else:
            with pytest.raises((IndexError, RuntimeError)):
                linear(inputs)


@pytest.mark.parametrize("kind", ["NVFP4WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_diffusers_reads_its_folders_of_torchao(families: Path, tmp_path: Path, kind: str) -> None:
    base = families / "qwen_image" / "base" / "transformer"
    how = getattr(torchao.prototype.mx_formats, kind, None) or getattr(torchao.quantization, kind)
    made = engine.QwenImageTransformer2DModel.from_pretrained(
        base, torch_dtype=torch.bfloat16, quantization_config=engine.TorchAoConfig(how())
    )
    made.save_pretrained(tmp_path / "torchao")
    found = of_diffusers(tmp_path / "torchao")
    assert found.outcome == "reads" and found.shown == "run"
    held = engine.QwenImageTransformer2DModel.from_pretrained(tmp_path / "torchao", torch_dtype=torch.bfloat16)
    pairs = list(zip(made.named_parameters(), held.named_parameters(), strict=True))
    packed = [name for (name, one), _ in pairs if hasattr(one, "qdata")]
    assert f"makes {len(packed)} tensors of torchao" in found.how and packed
    for (name, before), (other, after) in pairs:
        assert name == other and hasattr(after, "qdata") == hasattr(before, "qdata")
        decoded = [one.dequantize() if hasattr(one, "qdata") else one for one in (before, after)]
        assert torch.equal(*decoded)
    declared = {"quantization_config": {"quant_method": "torchao", "quant_type": {}}}
    assert diffusers.read({}, declared, is_file=False).outcome == "unknown"


def test_diffusers_refuses_one_file_without_scales(tmp_path: Path) -> None:
    found = of_diffusers(comfyui_fp8_legacy(tmp_path / "legacy"))
    assert found.outcome == "refuses" and "no weight_scale tensors" in found.how


def comfy_file(path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Reading:
    return of_comfyui(write_file(path, NATIVE | tensors, header))


def fp8_modules(**more: torch.Tensor) -> Tensors:
    found: Tensors = {}
    for module, shape in SHAPES.items():
        found[f"{module}.weight"] = torch.ones(shape).to(torch.float8_e4m3fn)
        found |= {f"{module}.{role}": value.clone() for role, value in more.items()}
    return found


def test_comfyui_obeys_the_header_and_then_not_the_legacy_sentinel(tmp_path: Path) -> None:
    legacy = fp8_modules(scale_weight=torch.tensor(0.02)) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    alone = comfy_file(tmp_path / "alone", legacy)
    assert alone.outcome == "reads" and any("full precision" in note for note in alone.notes)
    layers = json.dumps({"layers": {module: {"format": "float8_e4m3fn"} for module in SHAPES}})
    hidden = comfy_file(tmp_path / "hidden", legacy, {comfyui.HEADER: layers})
    assert hidden.outcome == "refuses" and "no weight_scale" in hidden.how
    assert any("hides" in note for note in hidden.notes)
    flat = comfy_file(tmp_path / "flat", fp8_modules(), {comfyui.HEADER: json.dumps({"quant_algo": "FP8"})})
    assert flat.outcome == "refuses" and "KeyError: 'layers'" in flat.how


def test_comfyui_drops_legacy_input_scales_of_exactly_one(tmp_path: Path) -> None:
    sentinel = {"scaled_fp8": torch.zeros(1, dtype=torch.float8_e4m3fn)}
    for value, dropped in ((1.0, True), (1.0000001, False)):
        scales = {"scale_weight": torch.tensor(0.02), "scale_input": torch.tensor(value)}
        found = comfy_file(tmp_path / str(value), fp8_modules(**scales) | sentinel)
        assert found.outcome == "reads" and any("drops 2" in note for note in found.notes) == dropped
        assert not any("full precision" in note for note in found.notes)


def test_comfyui_marks_say_what_codes_are(tmp_path: Path) -> None:
    scaled = fp8_modules(weight_scale=torch.tensor(0.02))
    right = {f"{module}.comfy_quant": marked('{"format": "float8_e4m3fn"}') for module in SHAPES}
    assert comfy_file(tmp_path / "right", scaled | right).outcome == "reads"
    half = {name: one for name, one in right.items() if name.startswith(ODD)}
    found = comfy_file(tmp_path / "half", scaled | half)
    assert found.outcome == "misreads" and found.modules == {UNSCALED: (EVEN,)}  # by module: one is marked, one not
    for text, outcome in (
        ('{"format": "nvfp4"}', "refuses"),
        ('{"format": "float8_e5m2"}', "misreads"),
        ('{"format": "of tomorrow"}', "unknown"),
        ("{}", "refuses"),
        ("no JSON", "refuses"),
    ):
        changed = {f"{module}.comfy_quant": marked(text) for module in SHAPES}
        assert comfy_file(tmp_path / text, scaled | changed).outcome == outcome, text
    # Codes without any scale are what they say.
    plain = comfy_file(tmp_path / "plain", fp8_modules())
    assert plain.outcome == "unknown" and f"takes the codes of {len(SHAPES)} modules without scales" in plain.how
    lost = {name: one for name, one in (scaled | right).items() if not name.startswith(ODD) or name.endswith(".weight")}
    found = comfy_file(tmp_path / "lost", lost)
    assert found.outcome == "unknown" and "takes 1 modules for float8_e4m3fn; takes the codes of 1 modules" in found.how


def test_comfyui_translates_names_of_flux1_and_loses_markers(tmp_path: Path) -> None:
    names = ("x_embedder.bias", "context_embedder.bias", "single_transformer_blocks.0.proj_mlp.bias")
    tensors = fp8_modules(weight_scale=torch.tensor(0.02)) | {name: torch.ones(8) for name in names}
    tensors |= {f"{module}.comfy_quant": marked('{"format": "float8_e4m3fn"}') for module in SHAPES}
    found = of_comfyui(write_file(tmp_path / "flux", tensors))
    assert found.outcome == "misreads" and not found.depends and any("loses" in note for note in found.notes)


def test_comfyui_prefixes_are_known(tmp_path: Path) -> None:
    tensors = fp8_modules(weight_scale=torch.tensor(0.02)) | NATIVE
    tensors |= {f"{module}.comfy_quant": marked('{"format": "float8_e4m3fn"}') for module in SHAPES}
    found = of_comfyui(
        write_file(tmp_path / "file", {f"model.diffusion_model.{name}": one for name, one in tensors.items()})
    )
    assert found.outcome == "reads" and not found.depends


def test_comfy_kitchen_decodes_the_layout_that_is_said_and_raises_without_a_scale() -> None:
    """The layout of ``comfyui.LAYOUT``, and not its halves; scales that are not padded do not decode at all."""
    rows, columns = SHAPES[ODD]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(1, 0x7E, (rows, columns // 16), dtype=torch.uint8, generator=generator)
    scales, factor = scales.view(torch.float8_e4m3fn), torch.tensor(0.001)

    def decoded(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
        dtype, shape = torch.float32, (rows, columns)
        params = TensorCoreNVFP4Layout.Params(scale=factor, block_scale=block_scale, orig_dtype=dtype, orig_shape=shape)
        found: torch.Tensor = QuantizedTensor(packed, "TensorCoreNVFP4Layout", params).dequantize()
        return found

    right = ours(codes, scales, factor)
    assert comfyui.LAYOUT.nibbles == "high" and comfyui.LAYOUT.scales == "128x4"
    assert torch.equal(decoded(swap(codes), swizzle(scales)), right)
    assert not torch.equal(decoded(codes, swizzle(scales)), right)  # and not a word
    with pytest.raises(RuntimeError):
        decoded(swap(codes), scales)
    missing = TensorCoreFP8Layout.Params(scale=None, orig_dtype=torch.float32, orig_shape=(8, 8))
    with pytest.raises(AttributeError):
        QuantizedTensor(torch.ones(8, 8).to(torch.float8_e4m3fn), "TensorCoreFP8Layout", missing).dequantize()


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "file", 0, 0)


@pytest.mark.parametrize(
    ("keys", "outcome"),
    [
        ({"quant_method": "compressed-tensors"}, "refuses"),
        ({"quant_method": "torchao", "quant_type": {}}, "reads"),
        ({"quant_method": "torchao"}, "unknown"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "unknown"),
        ({"quant_method": "fp8"}, "unknown"),
        ({"quant_method": "bfl"}, "refuses"),
        (None, "refuses"),
    ],
)
def test_vllm_omni_asks_config_alone(keys: dict[str, Any] | None, outcome: str) -> None:
    weight = {"a.weight": info("a.weight", "U8", 8, 8)}
    config = CLASS | ({} if keys is None else {"quantization_config": keys})
    found = vllm_omni.read(weight, config, is_file=False)
    assert found.outcome == outcome and (found.shown == "inferred") == (outcome == "reads" or keys is None)
    assert vllm_omni.read(weight, {}, is_file=True).outcome == "refuses"
    fp8 = {"a.weight": info("a.weight", "F8_E4M3", 8, 8)}
    assert keys is not None or vllm_omni.read(fp8, config, is_file=False).outcome == "unknown"
