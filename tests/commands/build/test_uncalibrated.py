"""build-nvfp4 without --export: the base itself is quantized, as ModelOpt's max calibration does, byte for byte."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import ALL, allowed
from faults import entries, refusal
from make_headers import model_of
from root import ROOT
from support import Tensors, build, config_of, copy, edit, load, packed_in, run_mopt, same_bits, tree
from verify_support import verify

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4
from modelopt_convert.formats.nvfp4.sweep import QUANTIZERS
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import load_preset, preset_names

CPU = ("--device", "cpu")
ROLES = ("weight", "weight_scale", "weight_scale_2")
PACKED = "single_transformer_blocks.0.proj_out"
QUERIES = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_modelopts_own_bytes(families: Path, tmp_path: Path, family: str) -> None:
    """The oracle is ModelOpt's export: calibration does not change weights, and which share a scale is seen in it."""
    where, preset = families / family, ALL[family][0]
    outcome = build(None, where / "base", tmp_path / "out", *allowed(family), preset=preset)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    arguments = ("--preset", preset, "--export", where / "nvfp4", "--base", where / "base", *allowed(family))
    assert run_mopt("build-nvfp4", *arguments, "--output", tmp_path / "calibrated").exit_code == 0
    out, calibrated, export = load(tmp_path / "out"), load(tmp_path / "calibrated"), load(where / "nvfp4/transformer")
    packed = packed_in(out)
    assert packed == packed_in(calibrated) and packed
    for module in packed:
        for role in ROLES:
            name = f"{module}.{role}"
            assert same_bits(out[name].reshape(export[name].shape), export[name]), name
    inputs = {f"{module}.input_scale" for module in packed}
    assert calibrated.keys() - out.keys() == inputs and not out.keys() - calibrated.keys()
    assert all(same_bits(tensor, calibrated[name]) for name, tensor in out.items())
    left, right = (config_of(tmp_path / name)["quantization_config"] for name in ("out", "calibrated"))
    assert left["ignore"] == right["ignore"]
    assert outcome.report["ledger"].keys() == {"base"}
    assert outcome.report["ledger"]["base"].keys() == load(where / "base/transformer").keys()


@pytest.mark.parametrize("name", [name for name in preset_names() if "nvfp4" in load_preset(name).preset.sets()])
def test_what_a_preset_lets_be_quantized_is_a_linear(name: str) -> None:
    """A header cannot tell: in the real architecture no embedding is left to be quantized, and all blocks are whole."""
    model = model_of(name)
    modules = dict(model.named_modules())
    matcher = PatternMatcher(dict.fromkeys(map(module_of, model.state_dict())))
    rules = load_preset(name).preset.rules("nvfp4")
    kept = {module for pattern in [*rules.structural, *rules.quality] for module in matcher.find(pattern)}
    weights = {key: one for key, one in model.state_dict().items() if key.endswith(".weight") and one.ndim == 2}
    packed = {module_of(key): weight for key, weight in weights.items() if module_of(key) not in kept}
    assert packed and all(isinstance(modules[module], torch.nn.Linear) for module in packed)
    assert all(weight.shape[1] % 16 == 0 for weight in packed.values())


def test_config_declares_what_there_is(built_uncalibrated: Path) -> None:
    from modelopt_convert import __version__

    config = config_of(built_uncalibrated)
    found = config["quantization_config"]
    assert "_name_or_path" not in config and config["_class_name"] == "FluxTransformer2DModel"
    assert found["dynamic_input_scale"] is True and found["config_groups"]["group_0"]["input_activations"]["dynamic"]
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == found["group_size"] == 16
    assert (found["quant_method"], found["quant_algo"]) == ("modelopt", "NVFP4")
    assert found["producer"] == {"name": "mopt", "version": __version__}
    assert found["swap_weight_nibbles"] is False and found["checkpoint_weight_scale_layout"] == "linear"
    assert not [name for name in load(built_uncalibrated) if name.endswith("input_scale")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wider_base_is_rounded_to_bf16_first(exports: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Values that BF16 does not hold, so that quantizing them as they are would give other codes."""

    def widen(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() * 1.003).to(dtype)

    def narrow(tensors: Tensors) -> None:
        widen(tensors)
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    wide = edit(exports / "base", tmp_path / "wide", widen)
    assert build(None, wide, tmp_path / "out").exit_code == 0
    assert build(None, edit(exports / "base", tmp_path / "narrow", narrow), tmp_path / "other").exit_code == 0
    out, other = load(tmp_path / "out"), load(tmp_path / "other")
    assert out.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in out.items())
    weight = load(wide)[f"{PACKED}.weight"].float()
    packed, _ = quantize_nvfp4(weight, weight.abs().amax() / 2688)
    assert not same_bits(packed, out[f"{PACKED}.weight"])


def test_siblings_share_the_scale_of_the_largest(exports: Path, tmp_path: Path) -> None:
    def grow(tensors: Tensors) -> None:
        tensors[f"{QUERIES[1]}.weight"] *= 5

    base = edit(exports / "base", tmp_path / "base", grow)
    assert build(None, base, tmp_path / "out").exit_code == 0
    out, source = load(tmp_path / "out"), load(base)
    own = {name: source[f"{name}.weight"].abs().amax().float() / 2688 for name in QUERIES}
    shared = max(own.values())
    assert own[QUERIES[0]] < shared / 2
    for name in QUERIES:
        packed, scale = quantize_nvfp4(source[f"{name}.weight"], shared)
        alone, _ = quantize_nvfp4(source[f"{name}.weight"], own[name])
        assert torch.equal(out[f"{name}.weight_scale_2"], shared)
        assert same_bits(out[f"{name}.weight"], packed) and same_bits(out[f"{name}.weight_scale"], scale)
        assert name == QUERIES[1] or not same_bits(alone, packed)


def test_shards_and_row_chunks_change_no_byte(
    exports: Path, tmp_path: Path, built_uncalibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_convert.write.pieces._COMPUTED_BYTES", 5000)  # rows of 320 bytes: 15 at a time
    monkeypatch.setattr("modelopt_convert.write.measure._MEASURED_BYTES", 4096)
    assert build(None, exports / "base", tmp_path / "out", "--max-shard-size", "700KB").exit_code == 0
    single, sharded = load(built_uncalibrated), load(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert single.keys() == sharded.keys() and all(same_bits(one, sharded[name]) for name, one in single.items())


def test_the_same_base_gives_the_same_bytes(exports: Path, tmp_path: Path, built_uncalibrated: Path) -> None:
    assert build(None, exports / "base", tmp_path / "out", preset=None).exit_code == 0
    mine, other = tree(tmp_path / "out"), tree(built_uncalibrated)
    assert mine.keys() == other.keys()  # the preset chosen by config.json may stand for several: another card
    assert mine["diffusion_pytorch_model.safetensors"] == other["diffusion_pytorch_model.safetensors"]
    assert build(None, exports / "base", tmp_path / "again").exit_code == 0
    assert tree(tmp_path / "again") == other


def value(name: str, number: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][3, 5] = number

    return change


def zero(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"].zero_()


def cut(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"] = tensors[f"{PACKED}.weight"][:, :-8]


def scaled(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight_scale"] = torch.ones(1)


def coded(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"] = tensors[f"{PACKED}.weight"].to(torch.int8)


WEIGHT = f"{PACKED}.weight"
DAMAGE = {
    "nan": (value(WEIGHT, float("nan")), "base.not_finite", (WEIGHT, "NaN"), "damaged"),
    "inf": (value(WEIGHT, float("-inf")), "base.not_finite", (WEIGHT, "infinity"), "damaged"),
    "zero": (zero, "base.all_zero", (WEIGHT,), f"--keep-bf16 '{PACKED}'"),
    "blocks": (cut, "base.block_size", (WEIGHT, "divisible by 16"), f"--keep-bf16 '{PACKED}'"),
    "scale": (scaled, "base.quantized", (f"{WEIGHT}_scale",), "as the base"),  # presets new has no --base
    "codes": (coded, "base.dtype", (WEIGHT, "I8"), "unquantized"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_base_is_refused_by_name(exports: Path, room: Path, kind: str) -> None:
    damage, code, names, hint = DAMAGE[kind]
    base = edit(exports / "base", room / "base", damage)
    refusal(lambda: build(None, base, room / "out"), room, code=code, names=names, hint=hint)
    if kind != "scale":
        kept = build(None, base, room / "out", "--keep-bf16", PACKED, "-n")
        assert kept.exit_code == (3 if kind == "codes" else 0)


@pytest.mark.parametrize(
    ("source", "more", "code"),
    [
        ("base", ["--preset", "none"], "preset.required"),
        ("base", ["--preset", "flux2-dev"], "preset.wrong_model"),
        ("base", ["--keep-bf16", "transformer_blocks.7.attn.to_q"], "preset.no_match"),
        ("base", ["--keep-bf16", "transformer_blocks.0.attn.to_q"], "preset.fused_group"),
        ("base", ["--keep-bf16", "**"], "preset.nothing_left"),
        ("base", ["--component", "transformer_2"], "input.missing"),
        ("nvfp4", [], "base.quantized"),
        ("fp8", [], "base.quantized"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    exports: Path, room: Path, source: str, more: list[str], code: str
) -> None:
    chosen = [] if "--preset" in more else ["--preset", "flux1-dev"]
    where = (*chosen, "--base", exports / source, "--output", room / "out", *more)
    refusal(lambda: run_mopt("build-nvfp4", *where), room, code=code)


@pytest.mark.parametrize("line", ["", 'shared_scale = [["to_q", "to_k"], ["attn.to_k", "attn.to_v"]]'])
def test_a_preset_must_say_once_what_shares_a_scale(exports: Path, room: Path, line: str) -> None:
    lines = load_preset("flux1-dev").text.splitlines()
    start = lines.index("shared_scale = [")
    (room / "mine.toml").write_text("\n".join([*lines[:start], line, *lines[lines.index("]", start) + 1 :]]))
    mine, words = str(room / "mine.toml"), "in two groups" if line else "does not say"
    refusal(
        lambda: build(None, exports / "base", room / "out", preset=mine),
        room,
        code="preset.shared_scale",
        names=(words,),
    )


def test_a_dry_run_plans_it_without_torch(exports: Path, room: Path) -> None:
    before = entries(room)
    outcome = build(None, exports / "base", room / "out", "-n")
    assert outcome.exit_code == 0 and outcome.report is not None and entries(room) == before
    assert outcome.report["status"] == "planned" and outcome.report["calibration"] == "none"
    assert outcome.report["counts"]["base"]["quantized"] == 24
    code = "import sys; from modelopt_convert.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = ["build-nvfp4", "--base", exports / "base", "--output", room / "out", "-n", "-q"]
    found = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "False\n", found.stderr


def test_people_are_told_first(exports: Path, tmp_path: Path) -> None:
    arguments = ["build-nvfp4", "--preset", "flux1-dev", "--base", exports / "base", "--output", tmp_path / "out", "-n"]
    told = run_mopt(*arguments, json_report=False)
    assert told.stderr.splitlines()[0] == f"no --export: quantizing {exports / 'base' / 'transformer'}, uncalibrated"
    assert "build.uncalibrated" in told.stderr
    assert "no --export" not in run_mopt(*arguments, "--quiet", json_report=False).stderr


def test_card_report_and_record_say_what_it_is(exports: Path, tmp_path: Path) -> None:
    outcome = build(None, exports / "base", tmp_path / "out")
    report = outcome.report
    assert report is not None and report["calibration"] == "none"
    assert {"build.uncalibrated", "engine.dynamic_input_scale"} <= {one["code"] for one in report["warnings"]}
    assert report["proof"]["status"] == "quantized here" and report["proof"]["counts"] == {"quantized here": 24}
    assert "not calibrated" in report["proof"]["method"]
    assert {one["verdict"] for one in report["verify"]["modules"].values()} == {"reproduced"}
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("quantized 24 modules from the base", "max calibration", "dynamic", "**NOT calibrated**"):
        assert words in card, words
    assert "_merge_modelopt_fp4_configs" in card
    assert "export" not in card.partition("## Known limits")[0] and "proven" not in card
    record = json.loads((tmp_path / "out" / "mopt.json").read_text())
    assert record["calibration"] == "none" and record["proof"]["status"] == "quantized here"
    assert record["sources"].keys() == {"base"}


def test_verify_takes_its_word_or_proves_it(exports: Path, built_uncalibrated: Path) -> None:
    alone, proven = (
        verify(built_uncalibrated, *CPU),
        verify(built_uncalibrated, *CPU, "--base", exports / "base", "--backend", "reference"),
    )
    for outcome in (alone, proven):
        assert outcome.exit_code == 0 and outcome.report is not None, outcome.message
    assert "not calibrated" in alone.report["verify"]["statement"]
    levels = {level["level"]: level for level in proven.report["verify"]["levels"]}
    assert levels["L2"]["status"] == "pass" and levels["L3"]["reason"].startswith("nothing was compared")
    modules = proven.report["verify"]["modules"]
    probes = [probe["status"] for one in modules.values() for probe in one["probes"]["reference"].values()]
    assert len(modules) == proven.report["verify"]["backends"][0]["modules"] and set(probes) == {"pass"}
    assert levels["L0"]["status"] == "warn" and "dynamic_input_scale" in levels["L0"]["warnings"][0]
    looked = run_mopt("inspect", built_uncalibrated)
    assert looked.report is not None and looked.report["engine"]["believes"]["input_scales"] == "ones"
    assert [one["code"] for one in looked.report["lint"]] == ["input_scale.dynamic"]


def flip(tensors: Tensors) -> None:
    tensors[WEIGHT][0, 0] ^= 1


def halve(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale_2"] /= 2


def one_scale(tensors: Tensors) -> None:
    tensors[f"{PACKED}.input_scale"] = torch.tensor(0.01)


@pytest.mark.parametrize("fault", [flip, halve, one_scale])
@pytest.mark.parametrize("recorded", [False, True])
def test_verify_finds_a_planted_fault(
    exports: Path, built_uncalibrated: Path, tmp_path: Path, fault: Callable[[Tensors], None], recorded: bool
) -> None:
    folder = edit(built_uncalibrated, tmp_path / "bad", fault)
    if recorded:
        (folder / "mopt.json").write_bytes((built_uncalibrated / "mopt.json").read_bytes())
    outcome = verify(folder, *CPU, *([] if recorded else ["--base", exports / "base"]))
    assert outcome.exit_code == 1 and outcome.report is not None
    failures = [words for level in outcome.report["verify"]["levels"] for words in level["failures"]]
    assert any(PACKED in words for words in failures)
    if fault is one_scale:
        (told,) = [words for words in failures if "dynamic_input_scale" in words]
        assert told.startswith(f"{PACKED}: has an input_scale, though config.json declares dynamic_input_scale")


@pytest.mark.parametrize("declared", [None, False, "yes"])
def test_without_the_declaration_a_missing_input_scale_is_a_fault(
    exports: Path, built_uncalibrated: Path, tmp_path: Path, declared: object
) -> None:
    def declare(config: dict[str, object]) -> None:
        config["quantization_config"] |= {"dynamic_input_scale": declared}  # type: ignore[operator]

    outcome = verify(edit(built_uncalibrated, tmp_path / "bad", None, declare), *CPU, "--base", exports / "base")
    assert outcome.exit_code == 1 and "input_scale" in outcome.message


def test_codes_that_are_not_the_bases_are_not_published(
    exports: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = QUANTIZERS["max"]

    def wrong(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scales = right(weight, scale)
        packed[0, 0] ^= 1
        return packed, scales

    monkeypatch.setitem(QUANTIZERS, "max", wrong)
    refusal(lambda: build(None, exports / "base", room / "out"), room, code="check.verify", exit_code=1)


def test_both_transformers_of_a_pipeline_are_quantized(families: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        copy(families / "wan" / "base", tmp_path / "base" / name)
    assert build(None, tmp_path / "base", tmp_path / "out", preset="wan2.2-t2v-a14b").exit_code == 0
    more = ("--component", "transformer_2")
    assert build(None, tmp_path / "base", tmp_path / "one", *more, preset="wan2.2-t2v-a14b").exit_code == 0
    assert tree(tmp_path / "out" / "transformer") == tree(tmp_path / "out" / "transformer_2") == tree(tmp_path / "one")
    assert "**NOT calibrated**" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", *CPU, "--base", tmp_path / "base").exit_code == 0


# Makes bases, a small one first, and prints by how many MB a large one raises the peak, and what was planned.
MEMORY = """
import json, sys
from pathlib import Path
import torch
from faults import write_transformer
from support import run_mopt

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

room = Path(sys.argv[2])
found = []
for name, count, n in (("small", 2, 256), ("large", 30, 2048)):
    if sys.argv[1] == "make":
        weight = torch.randn(n, n).bfloat16()
        tensors = {f"blocks.{k}.lin.weight": weight.clone() for k in range(count)}
        write_transformer(room / name, tensors | {"proj.weight": weight.clone()}, {"_class_name": "Sparse"})
    else:
        arguments = ["--preset", room / "mine.toml", "--base", room / name, "--output", room / "out" / name]
        outcome = run_mopt(sys.argv[3], *arguments, "--verify", "cpu", "--workers", "1")
        assert outcome.exit_code == 0, outcome.stdout
        found.append(peak())
        planned = outcome.report["peak_working_bytes"]
if found:
    print(json.dumps([found[1] - found[0], planned]))
"""


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_memory_does_not_grow_with_the_base(tmp_path: Path, command: str) -> None:
    """260 MB of weights, of which a piece at a time and the block scales of one module are held."""
    preset = load_preset("flux1-dev").text.split("[nvfp4]")[0].replace("FluxTransformer2DModel", "Sparse")
    rules = (
        'status = "candidate"\nsource = "-"\nmin_gpu = "-"\nknown_limits = []\nstructural = ["proj"]\nquality = []\n'
    )
    text = re.sub(r"(guidance_embeds|in_channels) = \w+", "", preset) + "".join(
        f"[{one}]\n{rules}" for one in ("nvfp4", "fp8")
    )
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for step in ("make", "run"):
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n{MEMORY}"
        line = [sys.executable, "-c", code, step, str(tmp_path), command]
        found = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert found.returncode == 0, found.stdout + found.stderr
    grown, planned = json.loads(found.stdout.splitlines()[-1])
    assert grown < planned < 100_000_000
