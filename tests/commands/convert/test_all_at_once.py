"""A conversion, a rewrite and ``verify`` tell every module that has a fault in one run, as builds do."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import told
from safetensors import safe_open
from safetensors.torch import save_file
from support import Tensors, copy, load, run_mopt

from modelopt_convert.checkpoint.names import module_of

# The block scales of a module in each dialect, and its codes.
ROLES = {
    "modelopt": ("weight_scale", "weight"),
    "comfyui": ("weight_scale", "weight"),
    "torchao": ("_weight_scale", "_weight_qdata"),
    "compressed-tensors": ("weight_scale", "weight_packed"),
    "bfl-diffusers": ("weight_scale", "weight"),
}


@pytest.fixture(scope="module")
def dialects(families: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every dialect."""
    room, export = tmp_path_factory.mktemp("dialects"), families / "qwen_image" / "nvfp4"
    made = {"modelopt": export / "transformer"}
    for dialect in ROLES:
        if dialect != "modelopt":
            made[dialect] = room / dialect
            outcome = run_mopt("convert", export, made[dialect], "--to", dialect)
            assert outcome.exit_code == 0, outcome.stderr
    return made


def change(folder: Path, how: Callable[[Tensors], object]) -> None:
    """Change the tensors of a folder's one file, and leave its header's metadata."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load(folder)
    how(tensors)
    save_file(tensors, file, metadata)
    (folder / "mopt.json").unlink(missing_ok=True)


def quantized(folder: Path, dialect: str) -> list[str]:
    return sorted(module_of(name) for name in load(folder) if name.endswith(f".{ROLES[dialect][0]}"))


@pytest.mark.parametrize("count", [1, 2, 5, None])
@pytest.mark.parametrize("dialect", ROLES)
def test_modules_that_no_dialect_allows_are_all_told(
    dialect: str, count: int | None, dialects: dict[str, Path], tmp_path: Path
) -> None:
    """Scales of another shape in some modules, and codes of one dimension in others."""
    draw = random.Random(f"{dialect} {count}")
    source = copy(dialects[dialect], tmp_path / "source")
    modules = quantized(source, dialect)
    draw.shuffle(modules)
    scales, codes = (modules, []) if count is None else (modules[:count], modules[count : 2 * count])

    def plant(tensors: Tensors) -> None:
        for role, chosen in zip(ROLES[dialect], (scales, codes), strict=True):
            for module in chosen:
                name = f"{module}.{role}"
                tensors[name] = tensors[name][1:, :-1].clone() if role == ROLES[dialect][0] else tensors[name].flatten()

    change(source, plant)
    outcome = run_mopt("convert", source, tmp_path / "out", "--to", "bf16", "--from", dialect)
    assert outcome.exit_code == 3 and outcome.report is not None, outcome.stderr
    error = outcome.report["error"]
    named = [{module_of(name) if name not in modules else name for name in one["names"]} for one in error["faults"]]
    assert sorted(named, key=sorted) == sorted(filter(None, (set(scales), set(codes))), key=sorted), error
    assert all(
        len(one["names"]) == 1 or f"{len(one['names'])} have this fault" in one["message"] for one in error["faults"]
    )
    assert outcome.stderr.splitlines()[-len(told(error)) :] == told(error)


def put(role: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, str], object]:
    return lambda tensors, module: tensors.update({f"{module}.{role}": how(tensors[f"{module}.{role}"])})


def lost(tensors: Tensors, module: str) -> None:
    for name in [name for name in tensors if module_of(name) == module]:
        del tensors[name]


KINDS: dict[str, Callable[[Tensors, str], object]] = {
    "no weight": lambda tensors, module: tensors.pop(f"{module}.weight"),
    "no weight_scale": lambda tensors, module: tensors.pop(f"{module}.weight_scale"),
    "lost": lost,
    "unknown tensor": lambda tensors, module: tensors.update({f"{module}.odd": torch.ones(2, dtype=torch.bfloat16)}),
    "scales of another dtype": put("weight_scale", lambda one: one.double()),
    "scales of another shape": put("weight_scale", lambda one: one.repeat(2, *[1] * (one.ndim - 1))),
    "other codes": put("weight", lambda one: (one.view(torch.uint8) ^ 0x19).view(one.dtype)),
    "a bias that is not the base's": put("bias", lambda one: one + 7),
}


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
@pytest.mark.parametrize("command", ["verify", "convert", "swap-nibbles"])
@pytest.mark.parametrize("seed", range(2))
def test_kinds_of_headers_and_of_data_are_told_in_one_run(
    seed: int, command: str, algorithm: str, families: Path, tmp_path: Path
) -> None:
    """The report names the modules of all kinds, and no other."""
    if (command, algorithm) == ("swap-nibbles", "fp8"):
        return  # FP8 has no nibbles
    draw, family = random.Random(f"{seed} {command} {algorithm}"), families / "qwen_image"
    source = copy(family / algorithm / "transformer", tmp_path / "source")
    modules = quantized(source, "modelopt")
    draw.shuffle(modules)
    kinds = ["other codes", *draw.sample(sorted(KINDS.keys() - {"other codes"}), 4)]
    where = {kind: [modules.pop() for _ in range(draw.choice([1, 2]))] for kind in kinds}

    def plant(tensors: Tensors) -> None:
        if command == "swap-nibbles":
            for module in quantized(source, "modelopt"):
                tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] << 4) | (tensors[f"{module}.weight"] >> 4)
        for kind, chosen in where.items():
            for module in chosen:
                KINDS[kind](tensors, module)

    change(source, plant)
    more = {"verify": [], "convert": [tmp_path / "out", "--to", "bf16"], "swap-nibbles": [tmp_path / "out"]}[command]
    outcome = run_mopt(command, source, *more, "--base", family / "base" / "transformer")
    assert outcome.exit_code in (1, 3) and outcome.report is not None, outcome.stderr
    error = outcome.report["error"]
    planted = {module for chosen in where.values() for module in chosen}
    named = {name for fault in error["faults"] for name in fault["names"]}
    assert {name if name in planted else module_of(name) for name in named} == planted, (where, error)
    assert not (tmp_path / "out").exists() and "--keep-bf16" not in json.dumps(error)


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_an_export_that_was_never_calibrated_names_all_modules(algorithm: str, exports: Path, tmp_path: Path) -> None:
    export, base = exports / f"{algorithm}_uncalibrated", ["--base", exports / "base"]
    modules = set(quantized(export / "transformer", "modelopt"))
    build = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}[algorithm]
    commands = [[build, "--preset", "none", "--export", export, *base, "--output", tmp_path / "out"]]
    commands += [["verify", export], ["verify", export, *base]]
    if algorithm == "nvfp4":
        commands += [["swap-nibbles", export, tmp_path / "out", *base]]
        commands += [["convert", export, tmp_path / "out", "--to", target] for target in ("bf16", "comfyui")]
    for command in commands:
        outcome = run_mopt(*command)
        assert outcome.exit_code in (1, 3) and outcome.report is not None, (command, outcome.stderr)
        error = outcome.report["error"]
        assert {name for fault in error["faults"] for name in fault["names"]} == modules, (command, error)
        assert "calibrate with real prompts" in error["hint"], (command, error["hint"])


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_weights_of_an_export_that_was_never_calibrated_are_looked_at(
    algorithm: str, exports: Path, tmp_path: Path
) -> None:
    """The word is about the weights that were compared; a build tells which are damaged, and with -v all modules."""
    export, base = exports / f"{algorithm}_uncalibrated", ["--base", exports / "base"]
    whole = run_mopt("verify", export, *base).report
    assert whole is not None and whole["verify"]["verdict"] == "fail"
    assert whole["verify"]["proof"] == "weights proven, never calibrated"
    assert {one["verdict"] for one in whole["verify"]["modules"].values()} == {"reproduced"}
    alone = run_mopt("verify", export).report
    assert alone is not None and alone["verify"]["proof"] == "not proven: no base"
    source = copy(export / "transformer", tmp_path / "source")
    modules = quantized(source, "modelopt")
    queries = [name for name in modules if name.endswith("attn.to_out.0")]

    def plant(tensors: Tensors) -> None:
        KINDS["other codes"](tensors, queries[0])
        scale = tensors[f"{queries[1]}.weight_scale"]
        tensors[f"{queries[1]}.weight_scale"] = torch.full_like(scale.float(), math.nan).to(scale.dtype)

    change(source, plant)
    command = ["build-nvfp4" if algorithm == "nvfp4" else "convert-fp8", "--preset", "none", "--export", source, *base]
    outcome = run_mopt(*command, "--output", tmp_path / "out")
    assert outcome.exit_code == 3 and outcome.report is not None, outcome.stderr
    found = {one["code"]: set(one["names"]) for one in outcome.report["error"]["faults"]}
    assert found["export.missing_input_scale"] == set(modules)
    others = {
        module_of(name) if name not in modules else name
        for code in found.keys() - {"export.missing_input_scale"}
        for name in found[code]
    }
    assert found["export.unusable_scale"] == {queries[1]} and others == set(queries[:2]), found
    told = run_mopt(*command, "--output", tmp_path / "out", "-v", json_report=False).stderr
    assert all(f"at: {name}" in told for name in modules)
    outcome = run_mopt("verify", source, *base)
    assert outcome.report is not None and outcome.report["verify"]["proof"] == "mismatch"
    failures = [text for level in outcome.report["verify"]["levels"] for text in level["failures"]]
    assert all(any(name in text and "input_scale" not in text for text in failures) for name in queries[:2])


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_one_wrong_code_has_one_verdict(algorithm: str, exports: Path, tmp_path: Path) -> None:
    """Also in a module that the build takes from the base: a few rows would call it near."""
    source, base = copy(exports / algorithm / "transformer", tmp_path / "source"), ["--base", exports / "base"]
    module = "single_transformer_blocks.0.norm.linear"

    def plant(tensors: Tensors) -> None:
        tensors[f"{module}.weight"].view(torch.uint8)[0, 0] ^= 1

    change(source, plant)
    build = ["build-nvfp4" if algorithm == "nvfp4" else "convert-fp8", "--preset", "flux1-dev", "--export", source]
    built = run_mopt(*build, *base, "--output", tmp_path / "out", "--accept-near").report
    verified = run_mopt("verify", source, *base).report
    assert built is not None and verified is not None
    assert built["proof"]["modules"][module]["verdict"] == "mismatch"
    assert verified["verify"]["modules"][module]["verdict"] == "mismatch"
    assert built["exit_code"] == verified["exit_code"] == 1


def test_a_conversion_says_that_fp8_was_never_calibrated(exports: Path, tmp_path: Path) -> None:
    export = exports / "fp8_uncalibrated"
    outcome = run_mopt("convert", export, tmp_path / "out", "--to", "torchao", "-n")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    (told,) = [one["message"] for one in outcome.report["warnings"] if one["code"] == "convert.dynamic_inputs"]
    count = len(quantized(export / "transformer", "modelopt"))
    assert told.startswith(f"{count} of {count} modules of SOURCE have no input_scale, never calibrated")


def test_a_conversion_names_the_scale_that_is_missing(exports: Path, tmp_path: Path) -> None:
    source = copy(exports / "fp8" / "transformer", tmp_path / "source")
    module = quantized(source, "modelopt")[0]
    change(source, lambda tensors: [tensors.pop(f"{module}.weight_scale")])
    outcome = run_mopt("convert", source, tmp_path / "out", "--to", "comfyui")
    assert (outcome.exit_code, outcome.error_code) == (3, "export.missing_weight_scale")
    assert f"tensor '{module}.weight_scale'" in outcome.message and "found no such tensor" in outcome.message


@pytest.mark.parametrize("seed", range(3))
def test_verify_names_every_module(seed: int, families: Path, tmp_path: Path) -> None:
    """What is missing, what has another shape, and what is not the base's: in one run, and each kind in one line."""
    draw, family = random.Random(seed), families / "qwen_image"
    source = copy(family / "nvfp4" / "transformer", tmp_path / "source")
    modules = quantized(source, "modelopt")
    draw.shuffle(modules)
    kinds = modules[:3], modules[3:5], modules[5:9]

    def plant(tensors: Tensors) -> None:
        for module in kinds[0]:
            del tensors[f"{module}.input_scale"]
        for module in kinds[1]:
            tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][1:].clone()
        for module in kinds[2]:
            tensors[f"{module}.weight"] ^= 1

    change(source, plant)
    request = ["verify", source, "--base", family / "base" / "transformer"]
    outcome = run_mopt(*request)
    assert outcome.exit_code == 1 and outcome.report is not None, outcome.stderr
    failures = [text for level in outcome.report["verify"]["levels"] for text in level["failures"]]
    named = {module for module in modules if any(module in text for text in failures)}
    assert named == {module for kind in kinds for module in kind}
    lines = [line for line in run_mopt(*request, json_report=False).stdout.splitlines() if line.startswith("fail: ")]
    for kind in kinds:
        assert [line for line in lines if f"{len(kind)} places" in line and any(one in line for one in kind)], lines
    assert len(lines) < 8, lines


@pytest.mark.parametrize("seed", range(2))
def test_a_rewrite_names_every_module(seed: int, families: Path, tmp_path: Path) -> None:
    """Modules that are not the base's: random codes are near nothing."""
    draw, family = random.Random(seed), families / "qwen_image"
    source = copy(family / "nvfp4" / "transformer", tmp_path / "source")
    modules = quantized(source, "modelopt")
    chosen = set(draw.sample(modules, 3))

    def plant(tensors: Tensors) -> None:
        for module in modules:
            weight = tensors[f"{module}.weight"]
            swapped = (weight << 4) | (weight >> 4)
            tensors[f"{module}.weight"] = torch.randint_like(weight, 256) if module in chosen else swapped

    change(source, plant)
    outcome = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", family / "base" / "transformer")
    assert outcome.exit_code in (1, 3) and outcome.report is not None, outcome.stderr
    assert {name for one in outcome.report["error"]["faults"] for name in one["names"]} == chosen, json.dumps(
        outcome.report["error"]
    )
