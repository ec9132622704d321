"""What FP8 builders were seen to get wrong on real exports: none of it happens here.

What has its test elsewhere:

- AWQ and SVDQuant taken for plain exports:
  ``commands/build/test_fp8_refusals.py::test_a_module_that_is_not_plain_fp8_is_refused``
- quant_algo matched as a substring: ``commands/build/test_fp8_refusals.py::test_other_algorithms_are_refused_by_name``
- an NVFP4 export: ``commands/build/test_fp8_refusals.py::test_a_real_nvfp4_export_is_refused``
- no input_scale: ``commands/build/test_fp8_refusals.py::test_an_export_that_was_never_calibrated_is_refused``
- scales of a checkpoint replace the export's:
  ``dialects/modelopt/test_amax_file.py::test_a_checkpoint_of_another_run_is_refused_with_both_values``
- cast to FP8 without a clamp: ``commands/build/test_fp8_oracle.py::test_what_is_clipped_is_counted_and_measured``
- codes without a scale: ``families/test_ltx2.py::test_no_codes_are_left_without_their_scale``
- one of several checkpoints picked: ``checkpoint/test_torch_archive.py::test_a_folder_with_none_or_several_is_refused``
- torch.load may execute what it reads: ``checkpoint/test_torch_archive.py::test_a_reduce_is_refused_and_never_runs``
- a whole .pt in memory:
  ``commands/build/test_fp8_memory.py::test_memory_does_not_grow_with_the_model_or_the_checkpoint``
- `ignore` has one of two spellings:
  ``commands/build/test_fp8_families.py::test_ignore_is_complete_on_disk_and_at_runtime``
- LTX-2 has no preset: ``families/test_ltx2.py::test_the_preset_is_chosen_by_the_bases_class``
"""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from archives import Bomb
from faults import SHARD, entries
from fp8_support import (
    E4M3,
    PACKED,
    REPLACED,
    checkpoint_of,
    convert,
    fp8_refused,
    modelopt_cast,
    old_export,
    packed_modules,
    small_fp8_pair,
    two_weights,
)
from root import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from support import Tensors, build, config_of, copy, edit, load, same_bits, tree

QKV = tuple(f"transformer_blocks.1.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v"))


@pytest.mark.parametrize("which", ["export", "base", "checkpoint", "pipeline", "file of the checkpoint"])
def test_overwrite_never_deletes_an_input(which: str, fp8: Path, base: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    export, other = copy(fp8, pipeline / "transformer"), copy(base, tmp_path / "base")
    checkpoint = copy(fp8, tmp_path / "ckpt")  # a checkpoint in its looks, so that --overwrite alone would allow it
    shutil.copy(checkpoint_of(fp8), checkpoint / "transformer.pt")
    output = {
        "export": export,
        "base": other,
        "checkpoint": checkpoint,
        "pipeline": pipeline,
        "file of the checkpoint": checkpoint / "transformer.pt",
    }[which]
    given = checkpoint / "transformer.pt" if which.startswith("file") else checkpoint
    before = entries(tmp_path)
    outcome = convert(export, other, output, "--overwrite", "--checkpoint", given)
    assert outcome.exit_code == 4 and outcome.error_code is not None, outcome.stderr
    assert outcome.error_code.startswith("output.") and entries(tmp_path) == before


@pytest.mark.parametrize("fault", ["nvfp4", "uncalibrated", "nan", "other base"])
def test_a_good_output_outlives_a_bad_input(fault: str, exports: Path, base: Path, tmp_path: Path) -> None:
    assert convert(exports / "fp8", base, tmp_path / "out").exit_code == 0
    before = tree(tmp_path / "out")
    scale = {f"{PACKED}.weight_scale": torch.tensor(float("nan"))}
    export, other = {
        "nvfp4": lambda: (exports / "nvfp4", base),
        "uncalibrated": lambda: (exports / "fp8_uncalibrated", base),
        "nan": lambda: (edit(exports / "fp8", tmp_path / "in", lambda tensors: tensors.update(scale)), base),
        "other base": lambda: (
            exports / "fp8",
            edit(base, tmp_path / "in", lambda tensors: tensors["x_embedder.bias"].add_(1.0)),
        ),
    }[fault]()
    outcome = convert(export, other, tmp_path / "out", "--overwrite")
    assert outcome.exit_code in (1, 3), outcome.stderr
    assert tree(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_patterns_that_match_nothing_are_refused(fp8: Path, families: Path, base: Path, tmp_path: Path) -> None:
    typo = "single_transformer_blocks.*.proj_mpl"
    for beside in (base, None):
        fp8_refused(
            fp8, beside, tmp_path, "--keep-bf16", typo, code="preset.no_match", names=(repr(typo),), hint="proj_mlp"
        )
    flux2 = families / "flux2"
    fp8_refused(flux2 / "fp8", flux2 / "base", tmp_path, code="preset.wrong_model", names=("Flux2Transformer2DModel",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_in_another_float_is_cast_to_bf16(dtype: torch.dtype, fp8: Path, base: Path, tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype).to(torch.bfloat16).to(dtype)

    other = edit(base, tmp_path / "base", widen)
    weights = load(other)
    plain = {name for name, tensor in load(fp8 / "transformer").items() if tensor.dtype == torch.bfloat16}

    def round_as_base(tensors: Tensors) -> None:
        for name in plain & weights.keys():
            tensors[name] = weights[name].to(torch.bfloat16)

    outcome = convert(edit(fp8, tmp_path / "export", round_as_base), other, tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    out = load(tmp_path / "out")
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16, E4M3, torch.float32}
    assert {name for name, tensor in out.items() if tensor.dtype == torch.float32} == {
        f"{module}.{role}" for module in packed_modules(out) for role in ("weight_scale", "input_scale")
    }
    assert same_bits(out[f"{REPLACED}.weight"], weights[f"{REPLACED}.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("module", [PACKED, REPLACED])
def test_a_base_of_another_shape_is_refused(module: str, fp8: Path, base: Path, tmp_path: Path) -> None:
    shape = {f"{module}.weight": torch.zeros(192, 32)}
    other = edit(base, tmp_path / "base", lambda tensors: tensors.update(shape))
    fp8_refused(fp8, other, tmp_path, code="base.shape", names=(f"{module}.weight", "[192, 32]"))


def test_what_was_quantized_is_never_listed_as_ignored(built_fp8: Path) -> None:
    packed = packed_modules(load(built_fp8))
    assert len(packed) == 24
    assert not packed & set(config_of(built_fp8)["quantization_config"]["ignore"])


def test_no_code_of_an_output_is_nan(fp8: Path, base: Path, tmp_path: Path) -> None:
    old = old_export(fp8, tmp_path / "old")
    assert convert(old, base, tmp_path / "out", "--checkpoint", checkpoint_of(fp8)).exit_code == 0
    for name, tensor in load(tmp_path / "out").items():
        assert bool(tensor.float().isfinite().all()), name


@pytest.mark.parametrize("with_base", [True, False])
def test_an_all_zero_layer_is_refused_and_the_hint_helps(with_base: bool, tmp_path: Path) -> None:
    """What ModelOpt's arithmetic makes of it: NaN codes under a scale of zero."""
    zero = torch.zeros(64, 96, dtype=torch.bfloat16)
    codes = modelopt_cast(zero, torch.tensor(0.0))
    assert bool(codes.float().isnan().all())
    export, base = small_fp8_pair(tmp_path / "made", two_weights() | {"lin": zero}, {"lin": 0.0})
    beside = base if with_base else None
    outcome = convert(export, beside, tmp_path / "out", preset="none")
    assert outcome.exit_code == 3 and outcome.error_code in {"export.unusable_scale", "export.not_finite"}
    assert "lin" in outcome.message and not (tmp_path / "out").exists()
    if with_base:
        outcome = convert(export, base, tmp_path / "out", "--keep-bf16", "lin", preset="none")
        assert outcome.exit_code == 0, outcome.stderr
        assert same_bits(load(tmp_path / "out")["lin.weight"], zero)


@pytest.mark.parametrize("with_base", [True, False])
def test_no_f16_is_left(with_base: bool, exports: Path, base: Path, tmp_path: Path) -> None:
    """A BF16 weight beside an F16 bias in one module is what others make of ModelOpt's default dtype."""
    outcome = convert(exports / "fp8_fp16", base if with_base else None, tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    out = load(tmp_path / "out")
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16, torch.float32, E4M3}
    assert {tensor.dtype for name, tensor in out.items() if name.endswith(".bias")} == {torch.bfloat16}


def test_stray_files_are_neither_read_nor_copied(fp8: Path, base: Path, built_fp8: Path, tmp_path: Path) -> None:
    export = copy(fp8, tmp_path / "export")
    for name in ("hf_quant_config.json", "pytorch_model.bin", "modelopt_state.pth", "transformer.pt", "backbone.pt"):
        (export / name).write_text('{"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}')
    (export / "old").mkdir()
    (export / "old" / "a.safetensors").write_bytes((export / SHARD).read_bytes())
    assert convert(export, base, tmp_path / "out").exit_code == 0
    found, clean = tree(tmp_path / "out"), tree(built_fp8)
    assert sorted(found) == ["README.md", "config.json", SHARD, "mopt.json"]
    assert found == clean
    (export / "old.safetensors.index.json").write_text("{}")
    outcome = convert(export, base, tmp_path / "third")
    assert outcome.exit_code == 3 and not (tmp_path / "third").exists()


def test_there_is_no_quantization_metadata(fp8: Path, base: Path, tmp_path: Path) -> None:
    export = copy(fp8, tmp_path / "export")
    layers = {"format_version": "1.0", "layers": {REPLACED: {"format": "fp8"}}}
    save_file(load(export), export / SHARD, {"format": "pt", "_quantization_metadata": json.dumps(layers)})
    assert convert(export, base, tmp_path / "out").exit_code == 0
    with safe_open(tmp_path / "out" / SHARD, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("with_base", [True, False])
def test_a_fused_group_kept_in_part_is_refused(with_base: bool, fp8: Path, base: Path, tmp_path: Path) -> None:
    beside = base if with_base else None
    fp8_refused(
        fp8, beside, tmp_path, "--keep-bf16", QKV[1], code="preset.fused_group", names=(", ".join(QKV),), hint=QKV[0]
    )


def test_a_group_that_the_export_packed_in_part_is_refused(fp8: Path, base: Path, tmp_path: Path) -> None:
    weight = load(base / "transformer")[f"{QKV[1]}.weight"]

    def unpack(tensors: Tensors) -> None:
        del tensors[f"{QKV[1]}.weight_scale"], tensors[f"{QKV[1]}.input_scale"]
        tensors[f"{QKV[1]}.weight"] = weight

    export = edit(fp8, tmp_path / "export", unpack)
    fp8_refused(export, base, tmp_path, code="preset.fused_group", names=(f"{QKV[1]} in BF16",))


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("module", [PACKED, REPLACED])
def test_a_tensor_missing_from_the_base_is_refused(
    module: str, leaf: str, fp8: Path, base: Path, tmp_path: Path
) -> None:
    other = edit(base, tmp_path / "base", lambda tensors: tensors.pop(f"{module}.{leaf}"))
    fp8_refused(fp8, other, tmp_path, code="base.missing_tensor", names=(f"{module}.{leaf}",), hint="whole")


@pytest.mark.parametrize("with_base", [True, False])
def test_codes_never_go_without_their_scales(with_base: bool, fp8: Path, base: Path, tmp_path: Path) -> None:
    outcome = convert(fp8, base if with_base else None, tmp_path / "out", "--keep-bf16", PACKED)
    assert outcome.exit_code == 0, outcome.stderr
    out = load(tmp_path / "out")
    ignore = set(config_of(tmp_path / "out")["quantization_config"]["ignore"])
    packed = packed_modules(out)
    assert packed and not packed & ignore and PACKED in ignore
    for module in packed:
        assert {f"{module}.weight_scale", f"{module}.input_scale"} <= out.keys()
    assert {name.rpartition(".")[0] for name in out if name.endswith("_scale")} == packed


def test_neither_of_two_transformers_is_left_out(exports: Path, base: Path, tmp_path: Path) -> None:
    """Other builders take the first. The second, which was trained further, is refused unless it is accepted."""
    export, other = tmp_path / "export", tmp_path / "base"
    for name, variant in (("transformer", "fp8"), ("transformer_2", "fp8_trained")):
        copy(exports / variant, export / name)
        copy(base, other / name)
        assert convert(exports / variant, base, tmp_path / name, "--accept-near").exit_code == 0
    refused = convert(export, other, tmp_path / "both")
    assert (refused.exit_code, refused.error_code) == (1, "check.proof"), refused.stderr
    assert "transformer_2" in refused.message and not (tmp_path / "both").exists()
    outcome = convert(export, other, tmp_path / "both", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert (outcome.report["proof"]["status"], outcome.report["proof"]["words"]) == ("not proven", "not proven: near")
    assert outcome.report["verify"]["proof"] == "not proven: near"
    for name in ("transformer", "transformer_2"):
        assert tree(tmp_path / "both" / name)[SHARD] == tree(tmp_path / name)[SHARD]
    flags = ("--component", "transformer_2", "--accept-near")
    assert convert(export, other, tmp_path / "second", *flags).exit_code == 0
    (found,) = (tmp_path / "second").rglob(SHARD)
    assert found.read_bytes() == (tmp_path / "transformer_2" / SHARD).read_bytes()


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("transformer_blocks.[01].norm1.linear", "preset.pattern"),
        ("transformer_blocks.(0|1).norm1.linear", "preset.no_match"),
        ("transformer_blocks.(", "preset.no_match"),
        ("x.embedder", "preset.no_match"),
        (".*", "preset.pattern"),
    ],
)
def test_pattern_characters_are_no_regular_expressions(
    pattern: str, code: str, fp8: Path, base: Path, tmp_path: Path
) -> None:
    fp8_refused(fp8, base, tmp_path, "--keep-bf16", pattern, code=code, names=(repr(pattern),))


def test_the_package_unpickles_in_one_place_and_only_weights() -> None:
    calls = []
    for path in sorted((ROOT / "modelopt_convert").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("torch.load", "pickle.load", "Unpickler")
            ):
                calls.append(node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not imported & {"pickle", "pickletools", "dill", "marshal"}, path
    (call,) = calls
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert given["weights_only"] == "True" and given["mmap"] == "True"


def test_no_pickle_is_opened_unless_it_is_named(fp8: Path, base: Path, tmp_path: Path) -> None:
    export = copy(fp8, tmp_path / "export")
    for name in ("backbone.pt", "transformer.pt", "pytorch_model.bin"):
        (export / name).write_bytes(pickle.dumps(Bomb(tmp_path / "fired")))
    assert convert(export, base, tmp_path / "out").exit_code == 0
    assert not (tmp_path / "fired").exists()
    pickle.loads((export / "backbone.pt").read_bytes())
    assert (tmp_path / "fired").exists()  # the bomb is a real one


def test_ignore_has_both_spellings(built_fp8: Path) -> None:
    """Other builders list FLUX.1's ff layers under the last of their names alone, which holds at one TP size."""
    ignore = set(config_of(built_fp8)["quantization_config"]["ignore"])
    for block in (0, 1):
        for name in ("ff.net.0.proj", "ff.proj_in", "ff.net.2", "ff.proj_out", "ff_context.net.0.proj"):
            assert f"transformer_blocks.{block}.{name}" in ignore


def test_a_failed_export_is_refused(exports: Path, base: Path, tmp_path: Path) -> None:
    export = copy(exports / "fp8_sharded", tmp_path / "export")
    config = config_of(export)
    del config["quantization_config"]
    (export / "config.json").write_text(json.dumps(config))
    for beside in (base, None):
        fp8_refused(export, beside, tmp_path, code="export.not_quantized", names=(str(export / "config.json"),))
    shard = "diffusion_pytorch_model-00002-of-00004.safetensors"
    other = copy(exports / "fp8_sharded", tmp_path / "other")
    (other / shard).unlink()
    fp8_refused(other, base, tmp_path, code="input.missing", names=(str(other), shard))


def test_the_bias_of_a_replaced_module_is_the_bases_too(fp8: Path, base: Path, tmp_path: Path) -> None:
    export = edit(fp8, tmp_path / "export", lambda tensors: tensors[f"{REPLACED}.bias"].add_(1.0))
    assert convert(export, base, tmp_path / "out").exit_code == 0
    out, expected = load(tmp_path / "out"), load(base / "transformer")
    assert same_bits(out[f"{REPLACED}.bias"], expected[f"{REPLACED}.bias"])
    assert {name for name in out if name.endswith(".bias")} == {name for name in expected if name.endswith(".bias")}


def test_names_that_do_not_overlap_are_refused(fp8: Path, base: Path, tmp_path: Path) -> None:
    def prefix(tensors: Tensors) -> None:
        renamed = {f"some_model.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    export = edit(fp8, tmp_path / "export", prefix)
    fp8_refused(export, base, tmp_path, code="base.naming", names=("some_model.",))
    outcome = convert(export, None, tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, "preset.no_match"), outcome.stderr


def test_the_fp8_set_of_flux1_keeps_proj_mlp(built_fp8: Path) -> None:
    packed = packed_modules(load(built_fp8))
    assert not [module for module in packed if module.endswith("proj_mlp")]


def test_build_nvfp4_refuses_fp8_and_says_where_to_go(fp8: Path, base: Path, tmp_path: Path) -> None:
    outcome = build(fp8, base, tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, "export.quant_algo")
    assert "convert-fp8" in outcome.message
