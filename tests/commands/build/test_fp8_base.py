"""convert-fp8 without --export: the base itself is quantized, as ModelOpt's max calibration does, byte for byte."""

import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, PRESETS, allowed
from faults import entries, refusal
from fp8_base_support import BF16_RULE, BROKEN, CPU, PACKED, WEIGHT, build, quantization
from fp8_support import E4M3, modelopt_cast, packed_modules, quotient
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Tensors, config_of, copy, edit, load, run_mopt, same_bits, tree
from verify_support import verify

from modelopt_convert import ConvertFp8Request, convert_fp8
from modelopt_convert.formats import tensor_bytes as raw
from modelopt_convert.formats.arithmetic import fp8_scale_of
from modelopt_convert.plan.fp8 import ENTRY
from modelopt_convert.run.errors import UsageError


@pytest.fixture(scope="module")
def built(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8-base") / "out"
    assert build(exports / "base", out).exit_code == 0
    return out


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_modelopts_own_bytes(families: Path, tmp_path: Path, family: str) -> None:
    """The oracle is ModelOpt's export: calibration does not change weights."""
    where, preset = families / family, ALL[family][0]
    more = allowed(family, "fp8") or BROKEN.get(family, [])
    outcome = build(where / "base", tmp_path / "out", *more, preset=preset)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out, base, export = load(tmp_path / "out"), load(where / "base/transformer"), load(where / "fp8/transformer")
    packed = packed_modules(out)
    both = packed & packed_modules(export)
    assert len(both) >= 10
    for module in both:
        for role in ("weight", "weight_scale"):
            name = f"{module}.{role}"
            assert same_bits(out[name].reshape(export[name].shape), export[name]), name
    # What the filter left alone in the export: by plain torch, in the dtype that ModelOpt's exporter takes.
    rule = "quotient in F32" if config_of(tmp_path / "out")["_class_name"] == "WanTransformer3DModel" else BF16_RULE
    for module in packed:
        weight, scale = base[f"{module}.weight"], out[f"{module}.weight_scale"]
        assert same_bits(scale, (weight.bfloat16().abs().amax().float() / 448).reshape(1)), module
        assert same_bits(out[f"{module}.weight"], quotient(weight, scale[0], rule)), module
    assert out.keys() == base.keys() | {f"{module}.weight_scale" for module in packed}
    proven = verify(tmp_path / "out", *CPU, "--base", where / "base")
    assert proven.exit_code == 0 and proven.report is not None, proven.message
    assert proven.report["verify"]["proof"] == "proven"
    modules = proven.report["verify"]["modules"]
    assert modules.keys() == packed and {one["verdict"] for one in modules.values()} == {"reproduced"}


@pytest.mark.parametrize("family", ["flux1", "wan"])
def test_all_else_is_what_a_calibrated_export_gives(families: Path, tmp_path: Path, family: str) -> None:
    where, preset = families / family, PRESETS[family][0]
    assert build(where / "base", tmp_path / "out", preset=preset).exit_code == 0
    assert build(where / "base", tmp_path / "other", "--export", where / "fp8", preset=preset).exit_code == 0
    out, other = load(tmp_path / "out"), load(tmp_path / "other")
    assert other.keys() - out.keys() == {f"{module}.input_scale" for module in packed_modules(out)}
    assert not out.keys() - other.keys() and all(same_bits(tensor, other[name]) for name, tensor in out.items())
    assert quantization(tmp_path / "out")["ignore"] == quantization(tmp_path / "other")["ignore"]


FINITE = {torch.bfloat16: 3.3e38, torch.float16: 6.5e4, torch.float32: 3.3e38}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(list(FINITE)),
    size=st.sampled_from([1e-39, 1e-20, 6e-8, 1e-3, 1.0, 3e3]),
    planted=st.sampled_from(["", "largest", "subnormals", "zeros", "ties", "nothing"]),
    divided=st.sampled_from(["BF16", "F32"]),
)
def test_the_quantizer_is_modelopts_on_any_weight(
    seed: int, dtype: torch.dtype, size: float, planted: str, divided: str
) -> None:
    """mtq's own calibration, its scale and its cast of the weight as ModelOpt's recipe loads it: in BF16."""
    from modelopt.torch.export.quant_utils import get_weight_scaling_factor

    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(17, 33, generator=generator) * size).to(dtype)
    if planted == "largest":
        weight[3, 5] = -FINITE[dtype]
    elif planted == "subnormals":
        weight = (weight / size * 1e-40).to(dtype) if dtype != torch.float16 else (weight / size * 1e-7).to(dtype)
    elif planted == "zeros":
        weight[:, ::2], weight[0] = 0.0, -0.0
    elif planted == "ties":
        weight = (torch.arange(17 * 33).reshape(17, 33) * 0.0625 - 17).to(dtype)
    elif planted == "nothing":
        weight *= 0.0
    loaded = weight.to(torch.bfloat16)
    linear = calibrated(loaded)
    scale = get_weight_scaling_factor(linear).squeeze()  # as the exporter stores it, and divides by it
    expected = modelopt_cast(loaded if divided == "BF16" else loaded.float(), scale)
    name = next(key for key, one in raw.TORCH_DTYPES.items() if one == dtype)
    data = bytes(raw.to_bytes(weight.contiguous()))
    step = 40 * weight.element_size()
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    mine = fp8_scale_of(max(raw.largest_of_chunk(piece, name) for piece in pieces))
    assert mine == float(scale)
    codes = b"".join(bytes(raw.quantize_chunk(piece, name, mine, divided)[0]) for piece in pieces)
    assert codes == bytes(raw.to_bytes(expected.contiguous()))


def calibrated(weight: torch.Tensor) -> torch.nn.Module:
    """A Linear of this weight, as ModelOpt's FP8 config calibrates it."""
    import modelopt.torch.quantization as mtq

    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data = weight.clone()
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda _model: None)
    found: torch.nn.Module = model[0]
    return found


def test_a_weight_of_zeros_gets_the_scale_that_modelopt_gives_it(exports: Path, tmp_path: Path) -> None:
    """Not a damaged base: last projections begin so."""

    def zero(tensors: Tensors) -> None:
        tensors[WEIGHT].zero_()

    base = edit(exports / "base", tmp_path / "base", zero)
    assert build(base, tmp_path / "out").exit_code == 0
    out = load(tmp_path / "out")
    assert float(out[f"{WEIGHT}_scale"]) == 1.0 and not bool(out[WEIGHT].view(torch.uint8).any())
    proven = verify(tmp_path / "out", *CPU, "--base", base)
    assert proven.exit_code == 0 and proven.report is not None
    assert proven.report["verify"]["modules"][PACKED]["verdict"] == "reproduced"


def test_the_dtype_of_the_quotient_is_that_of_a_models_first_parameter() -> None:
    """``infer_dtype_from_model`` of ModelOpt; which one diffusers keeps in F32 is read off its classes."""
    import diffusers

    kept: set[str] = set()
    classes = [
        one for name in dir(diffusers) if "Transformer" in name and isinstance(one := getattr(diffusers, name), type)
    ]
    for one in classes:
        patterns = getattr(one, "_keep_in_fp32_modules", None)
        if patterns:
            with torch.device("meta"):
                first = next(name for name, _ in one().named_parameters())
            if any(pattern in first.split(".") for pattern in patterns):
                kept.add(one.__name__)
    from modelopt_convert.plan import fp8

    assert kept == fp8._DIVIDED_IN_F32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wider_base_is_rounded_to_bf16_first(exports: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Values that BF16 does not hold, so that quantizing them as they are would give other codes."""

    def widen(tensors: Tensors) -> None:
        tensors |= {name: (tensor.float() * 1.003).to(dtype) for name, tensor in tensors.items()}

    def narrow(tensors: Tensors) -> None:
        widen(tensors)
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    wide = edit(exports / "base", tmp_path / "wide", widen)
    assert build(wide, tmp_path / "out").exit_code == 0
    assert build(edit(exports / "base", tmp_path / "narrow", narrow), tmp_path / "other").exit_code == 0
    out, other = load(tmp_path / "out"), load(tmp_path / "other")
    assert out.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in out.items())
    weight = load(wide)[WEIGHT]
    assert not same_bits(modelopt_cast(weight, out[f"{WEIGHT}_scale"][0]), out[WEIGHT])
    proven = verify(tmp_path / "out", *CPU, "--base", wide)
    assert proven.exit_code == 0 and proven.report is not None and proven.report["verify"]["proof"] == "proven"


def test_config_declares_what_the_dynamic_paths_of_engines_read(built: Path) -> None:
    from modelopt_convert import __version__

    found, tensors = quantization(built), load(built)
    # SGLang's Fp8Config.
    assert (found["quant_method"], found["activation_scheme"]) == ("fp8", "dynamic")
    plain = {
        name.removesuffix(".weight") for name, one in tensors.items() if name.endswith(".weight") and one.ndim == 2
    }
    plain -= packed_modules(tensors)
    # It takes an entry for every module that has it in its name: proj_out alone cannot be told from the blocks' own.
    assert plain - set(found["ignored_layers"]) == {"proj_out"}
    for entry in found["ignored_layers"]:
        assert "*" not in entry and not [name for name in packed_modules(tensors) if f".{entry}." in f".{name}."]
    # TensorRT-LLM's load_diffusion_quant_config.
    group = found["config_groups"]["group_0"]
    assert found["quant_algo"] == "FP8" and group["input_activations"]["dynamic"] and not group["weights"]["dynamic"]
    assert found["dynamic_input_scale"] is True and found["producer"] == {"name": "mopt", "version": __version__}
    assert not [name for name in tensors if name.endswith("input_scale")]
    assert {tensors[f"{module}.weight_scale"].shape for module in packed_modules(tensors)} == {(1,)}


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda keys: keys.pop(key)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (without("ignored_layers"), "fail", "x_embedder: not packed, yet not in `ignored_layers`"),
        (lambda keys: keys.update(ignored_layers=[]), "fail", "not packed, yet not in `ignored_layers`"),
        (lambda keys: keys.update(ignored_layers="proj_out"), "fail", "not packed, yet not in `ignored_layers`"),
        (lambda keys: keys["ignored_layers"].remove("x_embedder"), "fail", "not packed, yet not in `ignored_layers`"),
        (
            lambda keys: keys["ignored_layers"].append("single_transformer_blocks"),
            "fail",
            "`ignored_layers`, yet packed",
        ),
        (without("ignore"), "fail", "not packed, yet not in `ignore`"),
        (without("activation_scheme"), "fail", "quant_method"),
        (without("dynamic_input_scale"), "fail", "FP8 without input_scale"),
        (
            lambda keys: keys["config_groups"]["group_0"]["input_activations"].update(dynamic=False),
            "warn",
            "config_groups says that inputs are not dynamic",
        ),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_what_engines_read_of_the_config_is_what_the_tensors_are(
    exports: Path, built: Path, tmp_path: Path, change: Any, status: str, words: str, recorded: bool
) -> None:
    """SGLang's method ``fp8`` reads ``ignored_layers`` in place of ``ignore``; TensorRT-LLM reads ``config_groups``."""
    folder = copy(built, tmp_path / "out")
    config = config_of(folder)
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    if not recorded:
        (folder / "mopt.json").unlink()
    outcome = verify(folder, *CPU, "--base", exports / "base", "--sample", "1")
    assert outcome.exit_code == (1 if status == "fail" or recorded else 0) and outcome.report is not None
    (level,) = [one for one in outcome.report["verify"]["levels"] if one["level"] == "L0"]
    assert level["status"] == status and any(words in one for one in level["failures"] + level["warnings"]), level


def test_a_module_that_sglang_cannot_name_is_told(families: Path, tmp_path: Path) -> None:
    """Its classes leave FLUX.1's last projection plain whatever is declared. Of another one it has to find the name."""
    where = families / "hunyuan_video" / "base"
    text = (Path("presets") / "hunyuanvideo.toml").read_text()
    fp8 = text.index("[fp8]")
    moved = text[fp8:].replace('"proj_out",', "", 1).replace("quality = []", 'quality = ["proj_out"]')
    assert moved != text[fp8:]
    (tmp_path / "mine.toml").write_text(text[:fp8].replace('"proj_out" = ["final_layer.linear"]\n', "") + moved)
    told = build(where, tmp_path / "out", "-n", preset=str(tmp_path / "mine.toml"))
    assert told.exit_code == 0 and told.report is not None, told.stderr
    [words] = [one["message"] for one in told.report["warnings"] if one["code"] == "engine.shared_name"]
    assert "1 modules" in words and "proj_out" in words
    plain = build(where, tmp_path / "out", "-n", preset="hunyuanvideo")
    assert plain.report is not None and "engine.shared_name" not in {one["code"] for one in plain.report["warnings"]}


def test_shards_pieces_and_workers_change_no_byte(
    exports: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_convert.write.pieces._COMPUTED_BYTES", 5000)
    monkeypatch.setattr("modelopt_convert.write.measure._MEASURED_BYTES", 4096)
    more = ("--max-shard-size", "700KB", "--workers", "3")
    assert build(exports / "base", tmp_path / "out", *more).exit_code == 0
    single, sharded = load(built), load(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert single.keys() == sharded.keys() and all(same_bits(one, sharded[name]) for name, one in single.items())
    assert build(exports / "base", tmp_path / "again").exit_code == 0
    assert tree(tmp_path / "again") == tree(built)


def value(number: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[WEIGHT][3, 5] = number

    return change


def scaled(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale"] = torch.ones(1)


DAMAGE = {
    "nan": (value(math.nan), "base.not_finite", "NaN", "damaged"),
    "inf": (value(-math.inf), "base.not_finite", "infinity", "damaged"),
    "scale": (scaled, "base.quantized", "quantizer's tensor", "as the base"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_base_is_refused_by_name(exports: Path, room: Path, kind: str) -> None:
    damage, code, words, hint = DAMAGE[kind]
    base = edit(exports / "base", room / "base", damage)
    refusal(lambda: build(base, room / "out"), room, code=code, names=(WEIGHT, words), hint=hint)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--preset", "none"], "preset.required"),
        (["--preset", "flux2-dev"], "preset.wrong_model"),
        (["--keep-bf16", "transformer_blocks.0.attn.to_q"], "preset.fused_group"),
        (["--keep-bf16", "**"], "preset.nothing_left"),
    ],
)
def test_what_cannot_be_quantized_is_refused(exports: Path, room: Path, more: list[str], code: str) -> None:
    preset = None if "--preset" in more else "flux1-dev"
    refusal(lambda: build(exports / "base", room / "out", *more, preset=preset), room, code=code)


@pytest.mark.parametrize(
    "given", [{}, {"preset": "none", "output": "out"}, {"preset": "flux1-dev", "base": "b", "checkpoint": "c.pt"}]
)
def test_what_is_asked_for_has_to_fit(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="checkpoint" if "checkpoint" in given else "base"):
        ConvertFp8Request(**given).check()  # type: ignore[arg-type]
    assert ConvertFp8Request(preset="flux1-dev").needs_base and not ConvertFp8Request(export="e").needs_base


def test_a_dry_run_and_people_are_told_what_it_is(exports: Path, room: Path) -> None:
    before = entries(room)
    outcome = build(exports / "base", room / "out", "-n")
    assert outcome.exit_code == 0 and outcome.report is not None and entries(room) == before
    assert outcome.report["status"] == "planned" and outcome.report["calibration"] == "none"
    assert outcome.report["counts"]["base"]["quantized"] == 24
    # SGLang scales the inputs as they come: nothing is lost there.
    assert [one["code"] for one in outcome.report["warnings"]] == ["build.uncalibrated"]
    arguments = ["convert-fp8", "--preset", "flux1-dev", "--base", exports / "base", "--output", room / "out", "-n"]
    told = run_mopt(*arguments, json_report=False)
    assert told.stderr.splitlines()[0] == f"no --export: quantizing {exports / 'base' / 'transformer'}, uncalibrated"


def test_card_report_and_record_say_what_it_is(exports: Path, tmp_path: Path) -> None:
    """As people call it from Python."""
    report = convert_fp8(preset="flux1-dev", base=exports / "base", output=tmp_path / "out")
    assert report.calibration == "none" and report.proof is not None and report.verify is not None
    assert report.proof.status == "quantized here" and report.proof.words == "quantized here, not calibrated"
    assert "max" in report.proof.method and "dynamic" in report.proof.method
    assert {one.verdict for one in report.verify.modules.values()} == {"reproduced"}
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("quantized 24 modules from the base", "max calibration", "Inputs: dynamic", "**NOT calibrated**"):
        assert words in card, words
    assert "sglang generate" in card and "vllm-omni@0.30.0 fails to load it" in card and "proven" not in card
    record = json.loads((tmp_path / "out" / "mopt.json").read_text())
    assert record["calibration"] == "none" and record["proof"]["status"] == "quantized here"
    assert record["sources"].keys() == {"base"} and record["command"] == "convert-fp8"


def test_verify_takes_its_word_or_proves_it_by_max_calibration(exports: Path, built: Path) -> None:
    alone = verify(built, *CPU)
    assert alone.exit_code == 0 and alone.report is not None
    assert "not calibrated" in alone.report["verify"]["statement"]
    proven = verify(built, *CPU, "--base", exports / "base", "--backend", "reference")
    assert proven.exit_code == 0 and proven.report is not None, proven.message
    modules = proven.report["verify"]["modules"].values()
    assert {one["rule"] for one in modules} == {BF16_RULE}
    probes = [probe["status"] for one in modules for probe in one["probes"]["reference"].values()]
    assert probes and set(probes) == {"pass"}
    looked = run_mopt("inspect", built, "--engines")
    assert looked.report is not None and looked.report["lint"] == []
    sglang, vllm_omni = looked.report["engines"]
    assert sglang["believes"]["input_scales"] == "dynamic" and sglang["misreads"] == []
    assert len(vllm_omni["misreads"]) == 1 and "Cannot instantiate Fp8Config" in vllm_omni["misreads"][0]
    verdicts = {one["engine"]: one["verdict"] for one in looked.report["verdicts"]}
    assert verdicts["sglang"] == "right" and verdicts["vllm-omni"] == verdicts["diffusers"] == "refuses"


def test_without_the_declaration_a_missing_input_scale_is_a_fault(exports: Path, built: Path, tmp_path: Path) -> None:
    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"] |= {"dynamic_input_scale": False, "quant_method": "modelopt"}

    outcome = verify(edit(built, tmp_path / "bad", None, declare), *CPU, "--base", exports / "base")
    assert outcome.exit_code == 1 and "input_scale" in outcome.message


def test_both_transformers_of_a_pipeline_are_quantized(families: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        copy(families / "wan" / "base", tmp_path / "base" / name)
    assert build(tmp_path / "base", tmp_path / "out", preset="wan2.2-t2v-a14b").exit_code == 0
    more = ("--component", "transformer_2")
    assert build(tmp_path / "base", tmp_path / "one", *more, preset="wan2.2-t2v-a14b").exit_code == 0
    assert tree(tmp_path / "out" / "transformer") == tree(tmp_path / "out" / "transformer_2") == tree(tmp_path / "one")
    assert "**NOT calibrated**" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", *CPU, "--base", tmp_path / "base").exit_code == 0


@pytest.mark.parametrize("to", ["comfyui", "torchao", "compressed-tensors"])
def test_it_is_converted_in_one_run_and_back(exports: Path, built: Path, tmp_path: Path, to: str) -> None:
    inexact = ("--inexact", "bf16") if to == "comfyui" else ()
    outcome = build(exports / "base", tmp_path / "out", "--to", to, *inexact)
    assert outcome.exit_code == 0, outcome.stderr
    config = ("--config", exports / "base" / "transformer") if to == "comfyui" else ()
    back = run_mopt("convert", tmp_path / "out", tmp_path / "back", "--to", "modelopt", *config)
    assert back.exit_code == 0, back.stderr
    mine, found = quantization(built), quantization(tmp_path / "back")
    keys = ("quant_method", "activation_scheme", "quant_algo", "dynamic_input_scale")
    assert [found[key] for key in keys] == [mine[key] for key in keys]
    if to != "comfyui":  # there the fused modules are in BF16
        assert found["ignored_layers"] == mine["ignored_layers"]
        one, other = load(built), load(tmp_path / "back")
        assert one.keys() == other.keys()
        assert all(same_bits(one[name], other[name].reshape(one[name].shape)) for name in one)
    assert {tensor.dtype for tensor in load(tmp_path / "back").values()} == {E4M3, torch.float32, torch.bfloat16}


def test_any_weight_of_two_dimensions_has_codes() -> None:
    """No block of columns is needed."""
    assert ENTRY.fault is not None and not ENTRY.shares


@pytest.mark.parametrize("size", [7e4, 1e20, 3e35])
def test_weights_beyond_half_precision_are_proven(families: Path, tmp_path: Path, size: float) -> None:
    """In F16 such a base would hold infinities; no export is made of it, and none is looked for."""

    def grow(tensors: Tensors) -> None:
        tensors["blocks.3.ffn.net.0.proj.weight"] *= size / tensors["blocks.3.ffn.net.0.proj.weight"].abs().max()

    base = edit(families / "wan" / "base", tmp_path / "base", grow)
    outcome = build(base, tmp_path / "out", "--verify", "cpu", preset="wan2.2-t2v-a14b")
    assert outcome.exit_code == 0, outcome.stderr
    assert verify(tmp_path / "out", *CPU, "--base", base).exit_code == 0
