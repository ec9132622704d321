"""build-nvfp4 on real ModelOpt exports: what is in the output, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from faults import refused, small_pair
from support import build, config_of, load, same_bits, tree

QUANTIZED_LEAVES = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")


def test_packed_tensors_are_the_exports_bytes_and_the_rest_is_the_bases(exports: Path, built_nvfp4: Path) -> None:
    out, export, base = load(built_nvfp4), load(exports / "nvfp4/transformer"), load(exports / "base/transformer")
    packed = {name.removesuffix(".weight") for name, tensor in out.items() if tensor.dtype == torch.uint8}
    assert len(packed) == 24
    for name, tensor in out.items():
        module = name.rpartition(".")[0]
        source = export if module in packed else base
        assert same_bits(tensor, source[name]), name
    expected = {name for name in base if name.rpartition(".")[0] not in packed}
    expected |= {name for name in export if name.rpartition(".")[0] in packed}
    assert out.keys() == expected


def test_the_runtime_can_load_what_is_packed(built_nvfp4: Path) -> None:
    """SGLang 0.5.23 passes quant_config to the attention projections and single-block linears of FLUX.1, no others."""
    for name, tensor in load(built_nvfp4).items():
        if tensor.dtype == torch.uint8:
            module = name.removesuffix(".weight")
            single_out = module.startswith("single_transformer_blocks.") and module.endswith(".proj_out")
            assert single_out or (".attn." in module and module.endswith(QUANTIZED_LEAVES)), module


def test_every_packed_module_has_all_its_scales(built_nvfp4: Path) -> None:
    """SGLang fills a missing scale with ones and says nothing."""
    out = load(built_nvfp4)
    for name, tensor in out.items():
        if tensor.dtype == torch.uint8:
            module = name.removesuffix(".weight")
            rows, half = tensor.shape
            assert out[f"{module}.weight_scale"].shape == (rows, half // 8)
            assert out[f"{module}.weight_scale"].dtype == torch.float8_e4m3fn
            assert out[f"{module}.weight_scale_2"].shape == out[f"{module}.input_scale"].shape == ()
    assert not [name for name in out if "_quantizer" in name]


def test_config_says_what_the_tensors_are(built_nvfp4: Path, exports: Path) -> None:
    config, out = config_of(built_nvfp4), load(built_nvfp4)
    quantization = config["quantization_config"]
    source = config_of(exports / "nvfp4/transformer")["quantization_config"]
    assert "_name_or_path" not in config
    assert config["_class_name"] == "FluxTransformer2DModel"
    for key in ("quant_method", "quant_algo", "config_groups", "producer"):
        assert quantization[key] == source[key]
    assert quantization["quant_type"] == "NVFP4"
    assert quantization["group_size"] == 16
    assert quantization["swap_weight_nibbles"] is False
    assert quantization["checkpoint_weight_scale_layout"] == "linear"
    unpacked = {
        name.removesuffix(".weight")
        for name, tensor in out.items()
        if name.endswith(".weight") and tensor.ndim >= 2 and tensor.dtype != torch.uint8
    }
    # A part of another module's name bears a star.
    listed = {entry.replace("proj_out*", "proj_out") for entry in quantization["ignore"]}
    assert unpacked <= listed
    # What is listed beyond that is SGLang's or TensorRT-LLM's name of a listed module, and never a packed one.
    renamed = {"proj_in": "net.0.proj", "proj_out": "net.2", "up_proj": "net.0.proj", "down_proj": "net.2"}
    for extra in listed - unpacked:
        parent, _, last = extra.rpartition(".")
        assert f"{parent}.{renamed[last]}" in unpacked
        assert f"{extra}.weight" not in out


def test_header_metadata_is_just_the_format(built_nvfp4: Path) -> None:
    """A flat config under _quantization_metadata is what ComfyUI and SGLang's own reader choke on."""
    from safetensors import safe_open

    for path in built_nvfp4.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_single_file_has_no_index(built_nvfp4: Path) -> None:
    assert sorted(tree(built_nvfp4)) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "mopt.json"]


def test_shards_are_named_and_indexed_as_diffusers_does(exports: Path, tmp_path: Path, built_nvfp4: Path) -> None:
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from huggingface_hub import load_state_dict_from_file

    outcome = build(exports / "nvfp4_sharded", exports / "base", tmp_path / "out", "--max-shard-size", "1MB")
    assert outcome.exit_code == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    stem = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
    assert files == [f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = 0
    for file in files:
        for name, tensor in load_state_dict_from_file(tmp_path / "out" / file).items():
            assert index["weight_map"][name] == file
            sizes += tensor.numel() * tensor.element_size()
    assert index["metadata"]["total_size"] == sizes
    # SGLang 0.5.23 takes a packed weight whose block scale lies in another file for an unquantized one.
    places: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        places.setdefault(name.rpartition(".")[0], set()).add(file)
    assert all(len(files) == 1 for files in places.values()), places
    # The same tensors came out as from the single-file export.
    single, sharded = load(built_nvfp4), load(tmp_path / "out")
    assert single.keys() == sharded.keys()
    for name, tensor in single.items():
        assert same_bits(tensor, sharded[name])


def test_half_export_becomes_bf16_and_is_counted(exports: Path, tmp_path: Path) -> None:
    outcome = build(exports / "nvfp4_fp16", exports / "base", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    out, base = load(tmp_path / "out"), load(exports / "base/transformer")
    assert torch.float16 not in {tensor.dtype for tensor in out.values()}
    for name, tensor in out.items():
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, base[name])
    assert outcome.report["counts"]["export"]["from base: unquantized, F16 to BF16"] == 32
    assert outcome.report["counts"]["export"]["from base: F16 bias of a packed module, F16 to BF16"] == 24
    assert outcome.report["proof"]["counts"] == {"reproduced": 24, "reproduced (sampled rows)": 16}


@pytest.mark.parametrize(("factor", "error_code"), [(64.0, None), (1e7, "check.proof")])
def test_a_global_scale_under_which_all_codes_are_zero_proves_nothing(
    factor: float, error_code: str | None, tmp_path: Path
) -> None:
    """They are the nearest under it, and no block is worse than ModelOpt's under it."""
    shapes = {"lin": (64, 96), "other": (32, 64)}
    _, plain = small_pair(tmp_path / "plain", shapes)
    scale = load(plain)["lin.weight"].abs().max().float() / 2688 * factor
    export, base = small_pair(tmp_path / "made", shapes, scale)
    codes = load(export)["lin.weight"] & 0x77
    assert bool((codes == 0).all()) is (error_code is not None)
    if error_code is not None:
        refused(export, base, tmp_path, code=error_code, exit_code=1, names=("2 of 2", "lin"), preset="none")
        return
    outcome = build(export, base, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    module = outcome.report["proof"]["modules"]["lin"]
    assert (module["verdict"], module["scale_factor"]) == ("nearest", pytest.approx(factor))


def test_every_input_tensor_is_in_the_ledger(exports: Path, tmp_path: Path) -> None:
    outcome = build(exports / "nvfp4", exports / "base", tmp_path / "out")
    assert outcome.report is not None
    ledger = outcome.report["ledger"]
    assert ledger["export"].keys() == load(exports / "nvfp4/transformer").keys()
    assert ledger["base"].keys() == load(exports / "base/transformer").keys()
    dropped = {name for name, fate in ledger["export"].items() if fate.startswith("dropped")}
    assert load(exports / "nvfp4/transformer").keys() - load(tmp_path / "out").keys() == dropped
    assert sum(outcome.report["counts"]["export"].values()) == len(ledger["export"])


def test_same_input_same_bytes(exports: Path, tmp_path: Path, built_nvfp4: Path) -> None:
    assert build(exports / "nvfp4", exports / "base", tmp_path / "elsewhere").exit_code == 0
    assert tree(tmp_path / "elsewhere") == tree(built_nvfp4)


def test_manifest_digests_are_xxh3_of_the_tensors(built_nvfp4: Path) -> None:
    import xxhash

    manifest = json.loads((built_nvfp4 / "mopt.json").read_text())
    tensors = load(built_nvfp4)
    assert manifest["digests"]["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert manifest["digests"]["tensors"][name] == xxhash.xxh3_128_hexdigest(raw)
    for name, digest in manifest["digests"]["files"].items():
        assert digest == xxhash.xxh3_128_hexdigest((built_nvfp4 / name).read_bytes())


def test_nothing_in_the_output_names_a_path(built_nvfp4: Path, exports: Path, tmp_path: Path) -> None:
    for path in built_nvfp4.iterdir():
        content = path.read_bytes()
        assert str(exports).encode() not in content
        assert str(built_nvfp4.parent).encode() not in content


def test_card_tells_base_and_command(built: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(built / "README.md")
    assert card.data.base_model == "black-forest-labs/FLUX.1-dev"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "--model-path black-forest-labs/FLUX.1-dev --transformer-path" in card.text
    assert "diffusers itself cannot load" in card.text
