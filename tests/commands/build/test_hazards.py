"""What other builders were seen to get wrong on real exports: none of it happens here.

What has its test elsewhere:

- OUT lies in an input: ``stage/test_refusals.py::test_out_may_not_be_in_or_around_an_input``
- OUT is destroyed before the input is checked: ``stage/test_refusals.py::test_a_good_out_outlives_a_bad_input``
- patterns that match nothing are silent:
  ``plan/test_refusals_patterns.py::test_a_typo_is_refused_with_the_nearest_names``
- a preset of another model: ``plan/test_refusals_patterns.py::test_the_preset_of_another_model_is_refused``
- a base of another shape: ``plan/test_refusals_base.py::test_a_base_of_another_shape_is_refused``
- AWQ, SVDQuant taken for NVFP4: ``plan/test_refusals_export.py::test_what_awq_and_svdquant_leave_is_refused``
- quant_algo matched as a substring: ``plan/test_refusals_export.py::test_only_exactly_nvfp4_is_accepted``
- no input_scale, the runtime assumes 1: ``proof/test_refusals_scales.py::test_a_layer_never_calibrated_is_refused``
- NaN scales pass: ``proof/test_refusals_scales.py::test_an_all_zero_layer_is_refused_and_the_hint_helps``
- swizzled scales read as linear: ``proof/test_refusals.py::test_other_layouts_are_put_in_order_and_said``
- padded scales read as linear: ``plan/test_refusals_export.py::test_swizzled_scales_with_padding_are_put_in_order``
- q, k, v packed in part: ``plan/test_refusals_patterns.py::test_a_fused_group_kept_in_part_is_refused``
- the base lacks a tensor of a kept module:
  ``plan/test_refusals_base.py::test_a_tensor_missing_from_the_base_is_refused``
- transformer_2 silently left out: ``plan/test_refusals_base.py::test_two_transformers_need_two_bases``
- pattern characters act as regular expressions:
  ``plan/test_refusals_patterns.py::test_metacharacters_are_refused_or_literal``
- FLUX.2, halves of norm_out swapped:
  ``commands/build/test_families.py::test_what_an_engine_is_known_to_break_is_refused``
- no name overlaps, nothing is replaced:
  ``plan/test_refusals_base.py::test_a_module_that_no_base_tensor_shares_a_name_with_is_refused``
"""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from archives import Bomb
from faults import PACKED, QUANTIZATION_CONFIG, REPLACED, SHARD, refused
from root import ROOT
from safetensors import safe_open
from support import Tensors, build, config_of, copy, edit, load, same_bits, tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_in_another_float_is_cast_to_bf16_and_counted(
    dtype: torch.dtype, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    def widen(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)

    def round_as_base(tensors: Tensors) -> None:
        """F16 cannot hold every BF16 value; an export from such a base has what it holds."""
        for name in cast.keys() & tensors.keys():
            if tensors[name].dtype == torch.bfloat16:
                tensors[name] = cast[name].to(torch.bfloat16)

    other = edit(base, tmp_path / "base", widen)
    cast = load(other)
    export = edit(nvfp4, tmp_path / "export", round_as_base)
    outcome = build(export, other, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    out = load(tmp_path / "out")
    assert {tensor.dtype for tensor in out.values()} == {
        torch.bfloat16,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float32,
    }
    for name, tensor in out.items():
        if tensor.dtype == torch.float32:
            assert name.endswith(("weight_scale_2", "input_scale"))
        elif tensor.dtype == torch.bfloat16 and name.removesuffix(".bias") + ".weight_scale" not in out:
            assert same_bits(tensor, cast[name].to(torch.bfloat16)), name
    counts = outcome.report["counts"]["base"]
    kind = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    unused = sum(name.endswith(".weight_scale") for name in out) * 2  # weight and bias of each packed module
    assert counts == {f"used: cast {kind} to BF16": len(cast) - unused, "unused: packed in the output": unused}


def test_no_pickle_is_ever_opened(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export, other = copy(nvfp4, tmp_path / "export"), copy(base, tmp_path / "base")
    fired = tmp_path / "fired"
    for folder in (export, other):
        for name in ("backbone.pt", "transformer.pt", "pytorch_model.bin", "diffusion_pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Bomb(fired)))
    assert build(export, other, tmp_path / "out").exit_code == 0
    assert not fired.exists()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".json", ".safetensors"}
    pickle.loads((export / "backbone.pt").read_bytes())
    assert fired.exists()  # the bomb is a real one


def calls_and_imports(source: str) -> set[str]:
    """Dotted names of everything that a module's text imports or calls."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found


DANGEROUS = re.compile(
    r"(^|\.)(pickle|cPickle|dill|joblib|marshal|shelve|cloudpickle)(\.|$)|^(torch|np|numpy)\.load$|^(eval|exec|compile)$"
    r"|^os\.system$|^subprocess(\.|$)|^yaml\.(load|unsafe_load)$|^(torch|numpy)\.(load|serialization)"
)


# The second compiles a kernel of ours in a process of its own, since Triton can abort the one it runs in.
ALLOWED = {"amax_file.py": ["torch.load"], "triton_gemm.py": ["subprocess", "subprocess.run"]}


def test_nothing_in_the_package_can_unpickle_or_execute() -> None:
    """One file may: it opens the ``.pt`` that an option names, with ``weights_only`` and nothing else."""
    files = sorted((ROOT / "modelopt_convert").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        bad = sorted(name for name in calls_and_imports(path.read_text()) if DANGEROUS.search(name))
        assert bad == ALLOWED.get(path.name, []), path.name
    source = (ROOT / "modelopt_convert" / "dialects" / "modelopt" / "amax_file.py").read_text()
    assert source.count("torch.load(copy, ") == source.count("weights_only=True, mmap=True)") == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "import pickle",
        "from torch import load",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "from torch.serialization import load",
        "eval(text)",
        "subprocess.run(command)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert [name for name in calls_and_imports(line) if DANGEROUS.search(name)]


def test_no_scale_in_an_output_is_nan_or_zero(built_nvfp4: Path) -> None:
    scales = {name: tensor.float() for name, tensor in load(built_nvfp4).items() if "scale" in name}
    assert len(scales) == 72
    for name, scale in scales.items():
        assert bool(scale.isfinite().all()) and bool((scale > 0).all()), name


def test_no_f16_is_left(exports: Path, base: Path, tmp_path: Path) -> None:
    """ModelOpt's default dtype is Half; a BF16 weight beside an F16 bias in one module is what others make of it."""
    export = exports / "nvfp4_fp16"
    assert torch.float16 in {tensor.dtype for tensor in load(export / "transformer").values()}
    assert build(export, base, tmp_path / "out").exit_code == 0
    out = load(tmp_path / "out")
    assert torch.float16 not in {tensor.dtype for tensor in out.values()}
    for name, tensor in out.items():
        if name.endswith(".bias"):
            assert tensor.dtype == torch.bfloat16, name


def test_stray_files_are_not_copied(nvfp4: Path, base: Path, built_nvfp4: Path, tmp_path: Path) -> None:
    export = copy(nvfp4, tmp_path / "export")
    strays = ("hf_quant_config.json", "pytorch_model.bin", "x.txt", "modelopt_state.pth", ".hidden")
    for name in strays:
        (export / name).write_text('{"quantization": {"quant_algo": "FP8", "exclude_modules": []}}')
    (export / "old" / "deep").mkdir(parents=True)
    (export / "old" / "deep" / "a.safetensors").write_bytes((export / SHARD).read_bytes())
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert sorted(outcome.report["inputs"]["export"]["skipped_files"]) == sorted([*strays, "old"])
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*"))
    assert found == ["README.md", "config.json", SHARD, "mopt.json"]
    # Not a byte depends on them.
    assert tree(tmp_path / "out") == tree(built_nvfp4)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"x": "../x.safetensors"}}', "[]", ""])
@pytest.mark.parametrize("variant", ["nvfp4", "nvfp4_sharded"])
def test_a_stray_index_is_refused(variant: str, content: str, exports: Path, base: Path, tmp_path: Path) -> None:
    """Beside a single file it is an index that names nothing; beside a sharded one, a second index."""
    export = copy(exports / variant, tmp_path / "export")
    stray = export / "old.safetensors.index.json"
    stray.write_text(content)
    outcome = build(export, base, tmp_path / "out")
    codes = {"input.ambiguous", "index.weight_map", "index.path_escape", "index.json", "index.not_object"}
    assert outcome.exit_code == 3 and outcome.error_code in codes, outcome.error_code
    assert stray.name in outcome.message or str(export) in outcome.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_a_stray_file_without_an_index_is_refused(exports: Path, base: Path, tmp_path: Path) -> None:
    export = copy(exports / "nvfp4", tmp_path / "export")
    (export / "model.safetensors").write_bytes(next(export.glob("*.safetensors")).read_bytes())
    refused(export, base, tmp_path, code="input.ambiguous", names=(str(export), "model.safetensors"))


def test_a_stray_shard_beside_an_index_is_left_aside_and_said(exports: Path, base: Path, tmp_path: Path) -> None:
    export = copy(exports / "nvfp4_sharded", tmp_path / "export")
    (export / "a.safetensors").write_bytes(next(export.glob("*.safetensors")).read_bytes())
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["inputs"]["export"]["skipped_files"] == ["a.safetensors"]
    assert [one["code"] for one in outcome.report["warnings"]].count("input.left_aside") == 1
    assert "1 file of weights left aside" in outcome.stderr and "a.safetensors" in outcome.stderr
    assert build(exports / "nvfp4_sharded", base, tmp_path / "plain").exit_code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_there_is_no_quantization_metadata(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Not even where the export has some: ModelOpt's layerwise one would contradict the rebuilt config."""
    from safetensors.torch import save_file

    export = copy(nvfp4, tmp_path / "export")
    layers = {"format_version": "1.0", "layers": {REPLACED: {"format": "nvfp4"}}}
    metadata = {
        "format": "pt",
        "_quantization_metadata": json.dumps(layers),
        "quantization_config": json.dumps(QUANTIZATION_CONFIG),
    }
    save_file(load(export), export / SHARD, metadata)
    assert build(export, base, tmp_path / "out").exit_code == 0
    with safe_open(tmp_path / "out" / SHARD, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# Builds pairs of sparse files, a small one first, and prints by how many MB the large ones raised the process's peak.
MEMORY = """
import json, sys
from pathlib import Path
from faults import QUANTIZATION_CONFIG
from support import build

def sparse(folder, tensors, config):
    header, at, filled = {}, 0, {}
    for name, (dtype, shape, num_bytes, fill) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        if fill:
            filled[at] = fill * (num_bytes // len(fill))
        at += num_bytes
    raw = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for place, content in filled.items():
            file.seek(8 + len(raw) + place)
            file.write(content)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder

def pair(room, count, n):
    # All-zero weights: codes 0 under scales of 1 (E4M3 0x38, F32 0x3f800000), as ModelOpt writes a block of zeros.
    base, packed = {}, {}
    for module in (f"blocks.{number}.lin" for number in range(count)):
        base[f"{module}.weight"] = "BF16", [n, n], 2 * n * n, b""
        packed[f"{module}.weight"] = "U8", [n, n // 2], n * n // 2, b""
        packed[f"{module}.weight_scale"] = "F8_E4M3", [n, n // 16], n * n // 16, bytes([0x38])
        for role in ("weight_scale_2", "input_scale"):
            packed[f"{module}.{role}"] = "F32", [], 4, bytes([0, 0, 0x80, 0x3F])
    config = {"_class_name": "Sparse"}
    export = sparse(room / "export", packed, config | {"quantization_config": QUANTIZATION_CONFIG})
    return export, sparse(room / "base", base, config)

def peak():
    # Not ru_maxrss: across exec it keeps the peak of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def run(name, count, n):
    room = Path(sys.argv[1]) / name
    # One worker: each has a step of its own in memory.
    options = ("--keep-bf16", "blocks.0.lin", "--workers", "1")
    outcome = build(*pair(room, count, n), room / "out", *options, preset="none")
    assert outcome.exit_code == 0, outcome.stderr
    return peak() * 1024

before = run("small", 2, 256)
print(json.dumps([run("many", 60, 2048) - before, run("large", 2, 8192) - before]))
"""


def test_memory_grows_neither_with_the_model_nor_with_its_shards(tmp_path: Path) -> None:
    """60 modules, 503 MB of base; then two, 268 MB of base, with one tensor of 134 MB in a shard of 175 MB.

    Other builders hold all that they replace and a shard.
    """
    paths = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
    command = [sys.executable, "-c", paths + MEMORY, str(tmp_path)]
    # One thread: on a busy host, threads that wait for each other take most of the time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "large" / "out" / SHARD).stat().st_size > 170_000_000
    many, large = json.loads(found.stdout.splitlines()[-1])
    assert many < 40_000_000
    assert large < 100_000_000


def test_ignore_has_both_spellings(built_nvfp4: Path) -> None:
    """At TP > 1 the runtime looks FLUX.1's ff layers up under their names on disk, else under its own."""
    ignore = set(config_of(built_nvfp4)["quantization_config"]["ignore"])
    for block in (0, 1):
        for name in ("ff.net.0.proj", "ff.proj_in", "ff.net.2", "ff.proj_out", "ff_context.net.0.proj"):
            assert f"transformer_blocks.{block}.{name}" in ignore


def test_a_failed_export_is_refused(exports: Path, base: Path, tmp_path: Path) -> None:
    """ModelOpt's post-processing fails on shards after they were saved: packed, and no quantization_config."""
    export = copy(exports / "nvfp4_sharded", tmp_path / "export")
    config = config_of(export)
    del config["quantization_config"]
    (export / "config.json").write_text(json.dumps(config))
    refused(export, base, tmp_path, code="export.not_quantized", names=(str(export / "config.json"),), hint="again")


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("config.json", "input.no_config"),
        ("diffusion_pytorch_model-00002-of-00003.safetensors", "input.missing"),
    ],
)
def test_an_export_cut_short_is_refused(missing: str, code: str, exports: Path, base: Path, tmp_path: Path) -> None:
    export = copy(exports / "nvfp4_sharded", tmp_path / "export")
    (export / missing).unlink()
    refused(export, base, tmp_path, code=code, names=(str(export), missing))


def test_the_bias_of_a_replaced_module_is_the_bases_too(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors[f"{REPLACED}.bias"].add_(1.0))
    assert build(export, base, tmp_path / "out").exit_code == 0
    out, expected = load(tmp_path / "out"), load(base / "transformer")
    assert same_bits(out[f"{REPLACED}.bias"], expected[f"{REPLACED}.bias"])
    assert not same_bits(load(export)[f"{REPLACED}.bias"], expected[f"{REPLACED}.bias"])


def test_no_module_loses_its_bias(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    assert build(nvfp4, base, tmp_path / "out", "--keep-bf16", PACKED).exit_code == 0
    expected = {name for name in load(base / "transformer") if name.endswith(".bias")}
    assert {name for name in load(tmp_path / "out") if name.endswith(".bias")} == expected


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_both_sets_of_the_preset_keep_proj_mlp(algorithm: str) -> None:
    preset = tomllib.loads((ROOT / "presets" / "flux1-dev.toml").read_text())
    kept = preset[algorithm]["structural"] + preset[algorithm]["quality"]
    assert "single_transformer_blocks.*.proj_mlp" in kept
