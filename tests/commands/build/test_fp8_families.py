"""convert-fp8 on real exports of every family: proven, and no tensor that the loader would misread."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from families import allowed
from fp8_support import E4M3, convert, dequantized, packed_modules, quotient, relative_error
from safetensors import safe_open
from sglang_runtime import is_excluded, is_ignored, runtime_names
from support import Tensors, config_of, edit, load, same_bits, tree

PRESETS = {
    "flux1": "flux1-dev",
    "flux2": "flux2-dev",
    "wan": "wan2.2-t2v-a14b",
    "qwen_image": "qwen-image",
    "hunyuan_video": "hunyuanvideo",
    "ltx2": "ltx2",
}


@dataclass(frozen=True)
class Converted:
    """An output with what it was made from."""

    family: str
    path: Path
    report: dict[str, Any]
    out: Tensors
    export: Tensors
    base: Tensors

    @property
    def ignore(self) -> list[str]:
        return list(config_of(self.path)["quantization_config"]["ignore"])

    @property
    def unpacked(self) -> set[str]:
        """Modules that an engine could take for quantized ones: their weight has two dimensions or more."""
        return {
            name.removesuffix(".weight")
            for name, tensor in self.out.items()
            if name.endswith(".weight") and tensor.ndim >= 2 and tensor.dtype != E4M3
        }


@pytest.fixture(scope="module", params=PRESETS)
def converted(request: pytest.FixtureRequest, families: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    family = str(request.param)
    where = families / family
    output = tmp_path_factory.mktemp(family) / "out"
    outcome = convert(where / "fp8", where / "base", output, *allowed(family, "fp8"), preset=PRESETS[family])
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    tensors = load(where / "fp8" / "transformer"), load(where / "base" / "transformer")
    return Converted(family, output, outcome.report, load(output), *tensors)


def test_every_module_of_the_export_is_proven(converted: Converted) -> None:
    proof = converted.report["proof"]
    quantized = packed_modules(converted.export)
    written = packed_modules(converted.out)
    counts = {"reproduced": len(written), "reproduced (sampled rows)": len(quantized - written)}
    assert proof["status"] == "pass" and proof["counts"] == {one: count for one, count in counts.items() if count}
    assert proof["modules"].keys() == quantized
    for name, module in proof["modules"].items():
        assert module["codes"] == module["codes_equal"] > 0 and 0 < module["relative_error"] < 0.1
        weight, scale = converted.base[f"{name}.weight"], converted.export[f"{name}.weight_scale"]
        assert same_bits(quotient(weight, scale, module["rule"]), converted.export[f"{name}.weight"]), name
    # Wan's parameters are F32 in part, so ModelOpt divides in F32; elsewhere in BF16, which rounds twice. There is no
    # difference where the scale happens to be a power of two.
    rules = Counter(module["rule"] for module in proof["modules"].values())
    usual = "quotient in F32" if converted.family == "wan" else "quotient in BF16"
    assert rules[usual] >= 0.8 * rules.total()


def test_packed_weights_are_near_the_base(converted: Converted) -> None:
    """By plain arithmetic on what is on disk, every element of every module."""
    packed = packed_modules(converted.out)
    assert packed and packed <= packed_modules(converted.export)
    for module in packed:
        expected = converted.base[f"{module}.weight"]
        assert converted.out[f"{module}.weight"].shape == expected.shape
        assert relative_error(dequantized(converted.out, module), expected) < 0.1, module


def test_packed_tensors_are_the_exports_bytes(converted: Converted) -> None:
    for module in packed_modules(converted.out):
        assert same_bits(converted.out[f"{module}.weight"], converted.export[f"{module}.weight"]), module
        for role in ("weight_scale", "input_scale"):
            scale = converted.out[f"{module}.{role}"]
            assert same_bits(scale, converted.export[f"{module}.{role}"].reshape(1)), module
            assert scale.dtype == torch.float32 and bool(scale.isfinite().all()) and bool((scale > 0).all())


def test_all_else_is_the_base_in_bf16(converted: Converted) -> None:
    packed = packed_modules(converted.out)
    others = {name for name in converted.out if name.rpartition(".")[0] not in packed or name.endswith(".bias")}
    wide = {name for name in others if converted.out[name].dtype == torch.float32}
    for name in others:
        expected = converted.base[name]
        assert same_bits(converted.out[name], expected if name in wide else expected.to(torch.bfloat16)), name
    assert len(others) > 20
    # Of Wan's, diffusers keeps tables and norms in F32.
    assert bool(wide) is (converted.family == "wan")


def test_there_is_no_tensor_too_many_or_too_few(converted: Converted) -> None:
    """What the loader does not know it only warns of; what it misses it may fill with ones."""
    packed = packed_modules(converted.out)
    scales = {f"{module}.{role}" for module in packed for role in ("weight_scale", "input_scale")}
    assert converted.out.keys() == converted.base.keys() | scales
    dtypes = {tensor.dtype for tensor in converted.out.values()}
    assert dtypes == {E4M3, torch.float32, torch.bfloat16}
    assert {name for name, tensor in converted.out.items() if tensor.dtype == E4M3} == {
        f"{one}.weight" for one in packed
    }
    files = tree(converted.path)
    assert sorted(files) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "mopt.json"]
    with safe_open(converted.path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_preset_keeps_is_kept(converted: Converted) -> None:
    replaced = packed_modules(converted.export) - packed_modules(converted.out)
    counted = sum(rule["replaced"] for rule in converted.report["rules"])
    assert counted == len(replaced) and replaced <= converted.unpacked
    ledger = converted.report["ledger"]["export"]
    assert ledger.keys() == converted.export.keys()
    assert all(ledger[f"{module}.weight"].startswith("replaced: kept in BF16") for module in replaced)


def test_ignore_is_complete_on_disk_and_at_runtime(converted: Converted) -> None:
    """Both of SGLang's ways to ask, under each name that a module may have."""
    assert converted.unpacked <= {entry.removesuffix("*") for entry in converted.ignore}
    assert not [entry for entry in converted.ignore if set(entry[:-1]) & set("*?[]")]
    config = config_of(converted.path)
    for module in converted.unpacked:
        names = runtime_names(config, module)
        assert [name for name in names if not is_excluded(name, converted.ignore)] == [], module
    for module in packed_modules(converted.out):
        names = runtime_names(config, module)
        assert [name for name in names if is_ignored(name, converted.ignore)] == [], module


def test_hunyuans_single_blocks_are_counted_on_from_the_double_ones(families: Path, tmp_path: Path) -> None:
    """Its runtime calls the first of them Hunyuan.single_blocks.<num_layers>: another block than the one on disk."""
    where = families / "hunyuan_video"
    group = [f"single_transformer_blocks.0.{leaf}" for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    flags = [word for module in group for word in ("--keep-bf16", module)]
    outcome = convert(where / "fp8", where / "base", tmp_path / "out", *flags, preset="hunyuanvideo")
    assert outcome.exit_code == 0, outcome.stderr
    config = config_of(tmp_path / "out")
    ignore = config["quantization_config"]["ignore"]
    depth = config["num_layers"] + config["num_single_layers"]
    names = [f"Hunyuan.single_blocks.{block}.linear1" for block in range(depth)]
    found = [name for name in names if is_excluded(name, ignore) or is_ignored(name, ignore)]
    assert found == [f"Hunyuan.single_blocks.{config['num_layers']}.linear1"]


def test_diffusers_own_model_has_these_tensors(converted: Converted) -> None:
    """Names and shapes, less the scales."""
    import diffusers

    config = {key: value for key, value in config_of(converted.path).items() if key != "quantization_config"}
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    scales = {f"{one}.{role}" for one in packed_modules(converted.out) for role in ("weight_scale", "input_scale")}
    assert {name: tuple(tensor.shape) for name, tensor in converted.out.items() if name not in scales} == expected


def test_config_says_what_the_tensors_are(converted: Converted, families: Path) -> None:
    source = config_of(families / converted.family / "fp8" / "transformer")
    config = config_of(converted.path)
    quantization = config.pop("quantization_config")
    exported = source.pop("quantization_config")
    source.pop("_name_or_path")
    assert config == source
    for key in ("quant_method", "quant_algo", "config_groups", "producer"):
        assert quantization[key] == exported[key]
    assert (quantization["quant_method"], quantization["quant_algo"], quantization["quant_type"]) == (
        "modelopt",
        "FP8",
        "FP8",
    )
    assert not [key for key in quantization if "nibble" in key or "group_size" in key or "layout" in key]


def test_manifest_has_the_verdicts(converted: Converted) -> None:
    manifest = json.loads((converted.path / "mopt.json").read_text())
    assert manifest["preset"]["name"] == PRESETS[converted.family]
    assert manifest["proof"]["counts"] == converted.report["proof"]["counts"]
    assert manifest["digests"]["tensors"].keys() == converted.out.keys()
    assert converted.report["output"]["published"] is True


@pytest.mark.parametrize("family", PRESETS)
def test_without_a_preset_everything_stays_packed(family: str, families: Path, tmp_path: Path) -> None:
    where = families / family
    outcome = convert(where / "fp8", where / "base", tmp_path / "out", *allowed(family, "fp8"), preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert packed_modules(load(tmp_path / "out")) == packed_modules(load(where / "fp8" / "transformer"))


@pytest.mark.parametrize("max_shard_size", ["300KB", "1MB"])
def test_a_module_is_never_split_over_shards(
    max_shard_size: str, exports: Path, base: Path, built_fp8: Path, tmp_path: Path
) -> None:
    """A runtime that finds no scale in the file of the weight takes it for an unquantized one."""
    outcome = convert(exports / "fp8_sharded", base, tmp_path / "out", "--max-shard-size", max_shard_size)
    assert outcome.exit_code == 0, outcome.stderr
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    places: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        places.setdefault(name.rpartition(".")[0], set()).add(file)
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dict
    assert len(set(index["weight_map"].values())) > 2 and all(len(files) == 1 for files in places.values())
    left, right = load(tmp_path / "out"), load(built_fp8)
    assert left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def test_same_input_same_bytes(fp8: Path, base: Path, built_fp8: Path, tmp_path: Path) -> None:
    assert convert(fp8, base, tmp_path / "again").exit_code == 0
    assert tree(tmp_path / "again") == tree(built_fp8)


def test_digests_are_of_what_was_written(fp8: Path, tmp_path: Path) -> None:
    """Of cast, dequantized and copied tensors alike."""
    assert convert(fp8, None, tmp_path / "out").exit_code == 0
    digests = json.loads((tmp_path / "out" / "mopt.json").read_text())["digests"]["tensors"]
    out = load(tmp_path / "out")
    assert digests.keys() == out.keys()
    for name, tensor in out.items():
        assert digests[name] == xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()), name


def test_fp8_attention_is_carried_over(fp8: Path, base: Path, tmp_path: Path) -> None:
    """As --quantize-mha declares it."""
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    export = edit(
        fp8, tmp_path / "in", change_config=lambda config: config["quantization_config"].update(kv_cache_scheme=scheme)
    )
    assert convert(export, base, tmp_path / "out").exit_code == 0
    assert config_of(tmp_path / "out")["quantization_config"]["kv_cache_scheme"] == scheme
