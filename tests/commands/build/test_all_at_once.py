"""One run tells every fault of a look: each kind in a line, with all of its modules in the report.

The law: of modules with planted faults, at random, the report names all under the code of the fault, and no other.
"""

import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from faults import told
from support import Outcome, Tensors, edit, load, run_mopt

from modelopt_convert.checkpoint.names import module_of

Plant = Callable[[Tensors, Tensors, str], object]  # the export's tensors, the base's, the module
SMALL = torch.zeros(2, 3, dtype=torch.bfloat16)


def without(role: str) -> Plant:
    return lambda export, _base, module: export.pop(f"{module}.{role}")


def changed(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    def plant(export: Tensors, _base: Tensors, module: str) -> None:
        export[f"{module}.{role}"] = change(export[f"{module}.{role}"])

    return plant


def based(change: Callable[[torch.Tensor], torch.Tensor] | None) -> Plant:
    def plant(_export: Tensors, base: Tensors, module: str) -> None:
        weight = base.pop(f"{module}.weight")
        if change is not None:
            base[f"{module}.weight"] = change(weight)

    return plant


def filled(role: str, value: float) -> Plant:
    return changed(role, lambda tensor: torch.full_like(tensor, value))


OF_BASE: dict[str, tuple[str, Plant]] = {
    "no tensor in the base": ("base.missing_tensor", based(None)),
    "another shape in the base": ("base.shape", based(lambda weight: weight[:7, :9].clone())),
    "another dtype in the base": ("base.dtype", based(lambda weight: weight.double())),
}
HEADERS: Mapping[str, Mapping[str, tuple[str, Plant]]] = {
    "nvfp4": OF_BASE
    | {
        "no input_scale": ("export.missing_input_scale", without("input_scale")),
        "no weight_scale": ("export.missing_weight_scale", without("weight_scale")),
        "no weight_scale_2": ("export.missing_weight_scale_2", without("weight_scale_2")),
        "no weight": ("export.weight", without("weight")),
        "an FP8 weight": ("export.mixed", changed("weight", lambda one: one.view(torch.float8_e4m3fn))),
        "scales of another dtype": ("export.shape", changed("weight_scale", torch.Tensor.float)),
        "scales of another shape": ("export.shape", changed("weight_scale", lambda one: one[1:].clone())),
        "two global scales": ("export.shape", changed("weight_scale_2", lambda one: one.repeat(2))),
    },
    "fp8": OF_BASE
    | {
        "no input_scale": ("export.missing_input_scale", without("input_scale")),
        "no weight_scale": ("export.missing_weight_scale", without("weight_scale")),
        "no weight": ("export.weight", without("weight")),
        "a packed weight": ("export.mixed", changed("weight", lambda one: one.view(torch.uint8))),
        "a second scale": (
            "export.mixed",
            lambda export, _base, module: export.update({f"{module}.weight_scale_2": torch.tensor(1.0)}),
        ),
        "a scale of another dtype": ("export.shape", changed("input_scale", torch.Tensor.half)),
        "a scale a row": ("export.shape", changed("weight_scale", lambda one: one.repeat(3))),
    },
}
VALUES: Mapping[str, Mapping[str, tuple[str, Plant]]] = {
    "nvfp4": {
        "block scales that are NaN": ("export.unusable_scale", filled("weight_scale", float("nan"))),
        "negative block scales": ("export.unusable_scale", filled("weight_scale", -1.0)),
        "a global scale of 0": ("export.unusable_scale", filled("weight_scale_2", 0.0)),
        "an infinite input scale": ("export.unusable_scale", filled("input_scale", float("inf"))),
        "a bias that is NaN": ("export.not_finite", filled("bias", float("nan"))),
        "another bias": ("export.other_base", filled("bias", 7.0)),
    },
    "fp8": {
        "a scale that is NaN": ("export.unusable_scale", filled("weight_scale", float("nan"))),
        "an infinite input scale": ("export.unusable_scale", filled("input_scale", float("inf"))),
        "a bias that is NaN": ("export.not_finite", filled("bias", float("nan"))),
        "another bias": ("export.other_base", filled("bias", 7.0)),
    },
}


def lost(export: Tensors, _base: Tensors, module: str) -> None:
    for name in [name for name in export if module_of(name) == module]:
        del export[name]


def one_code(export: Tensors, _base: Tensors, module: str) -> None:
    """The signs of one byte of codes, or of one code, anywhere: the rows that are sampled need not see it."""
    codes = export[f"{module}.weight"].view(torch.uint8)
    flips = 0x88 if export[f"{module}.weight"].dtype == torch.uint8 else 0x80
    large = ((codes & 0x07) > 1) & ((codes & 0x70) > 0x10)
    row, column = random.Random(module).choice(large.nonzero().tolist())
    codes[row, column] ^= flips


MIXED = {
    algorithm: HEADERS[algorithm]
    | VALUES[algorithm]
    | {"a module that is lost": ("export.missing_tensor", lost), "a wrong code": ("check.proof", one_code)}
    for algorithm in HEADERS
}
COMMANDS = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}


def quantized(export: Path) -> list[str]:
    return [
        name.removesuffix(".weight_scale") for name in load(export / "transformer") if name.endswith("weight_scale")
    ]


def planted(
    source: Path, base: Path, room: Path, kinds: Mapping[str, tuple[str, Plant]], where: Mapping[str, list[str]]
) -> tuple[Path, Path]:
    """An export and a base with each of the kinds in its modules."""
    tensors = load(source / "transformer"), load(base / "transformer")
    for kind, modules in where.items():
        for module in modules:
            kinds[kind][1](*tensors, module)

    def into(new: Tensors) -> Callable[[Tensors], None]:
        return lambda old: (old.clear(), old.update(new))[0]  # type: ignore[func-returns-value]

    return edit(source, room / "export", into(tensors[0])), edit(base, room / "based", into(tensors[1]))


def refused_for(outcome: Outcome, codes: Mapping[str, str], where: Mapping[str, list[str]]) -> None:
    """Require that the report names, code by code, all modules that have a fault, and no other."""
    assert outcome.exit_code == 3 and outcome.report is not None, outcome.stderr
    error = outcome.report["error"]
    expected: dict[str, set[str]] = {}
    for kind, modules in where.items():
        expected.setdefault(codes[kind], set()).update(modules)
    found: dict[str, set[str]] = {}
    for fault in error["faults"]:
        assert len(set(fault["names"])) == len(fault["names"]) > 0 and fault["hint"]
        known = {name for modules in where.values() for name in modules}
        found.setdefault(fault["code"], set()).update(
            name if name in known else module_of(name) for name in fault["names"]
        )
        first = fault["names"][0]
        assert first in fault["message"], fault
        assert len(fault["names"]) == 1 or re.search(rf"\b{len(fault['names'])}\b", fault["message"]), fault
    assert found == expected
    assert len(error["faults"]) == len(where), [fault["message"] for fault in error["faults"]]
    assert outcome.stderr.splitlines()[-len(told(error)) :] == told(error)


@pytest.mark.parametrize("algorithm", COMMANDS)
@pytest.mark.parametrize("look", ["headers", "values"])
def test_each_kind_in_all_modules_is_one_line(look: str, algorithm: str, exports: Path, tmp_path: Path) -> None:
    kinds = {"headers": HEADERS, "values": VALUES}[look][algorithm]
    packed = quantized(exports / algorithm)
    for number, kind in enumerate(kinds):
        room = tmp_path / str(number)
        source, base = planted(exports / algorithm, exports / "base", room, kinds, where := {kind: packed})
        request = [
            COMMANDS[algorithm],
            "--preset",
            "none",
            "--export",
            source,
            "--base",
            base,
            "--output",
            room / "out",
        ]
        refused_for(run_mopt(*request), {name: code for name, (code, _) in kinds.items()}, where)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("algorithm", COMMANDS)
@pytest.mark.parametrize("look", ["headers", "values", "mixed"])
def test_several_kinds_in_some_modules_are_all_told(
    look: str, algorithm: str, seed: int, exports: Path, tmp_path: Path
) -> None:
    draw = random.Random(f"{look} {algorithm} {seed}")
    kinds = {"headers": HEADERS, "values": VALUES, "mixed": MIXED}[look][algorithm]
    packed = quantized(exports / algorithm)
    draw.shuffle(packed)
    where = {}
    chosen = draw.sample(sorted(kinds), draw.choice([2, 2, 3]))
    if look == "mixed":  # of what headers tell, of what values tell, and of what only the comparison of all bytes does
        chosen = [*draw.sample(sorted(HEADERS[algorithm]), 2), *draw.sample(sorted(VALUES[algorithm]), 2)]
        chosen += ["a module that is lost", "a wrong code"]
    for kind in chosen:
        count = draw.choice([1, 2, 5])
        where[kind], packed = packed[:count], packed[count:]
    source, base = planted(exports / algorithm, exports / "base", tmp_path, kinds, where)
    request = [COMMANDS[algorithm], "--preset", "none", "--export", source, "--base", base]
    outcome = run_mopt(*request, "--output", tmp_path / "out")
    refused_for(outcome, {name: code for name, (code, _) in kinds.items()}, where)


def test_faults_of_two_transformers_come_together(exports: Path, tmp_path: Path) -> None:
    """One has a fault in its headers, the other a code that only the comparison of all bytes finds."""
    kinds, packed = MIXED["nvfp4"], quantized(exports / "nvfp4")
    faults = {"transformer": "no weight_scale", "transformer_2": "a wrong code"}
    for (folder, kind), module in zip(faults.items(), packed, strict=False):
        source, base = planted(exports / "nvfp4", exports / "base", tmp_path / kind, kinds, {kind: [module]})
        for what, path in (("export", source), ("base", base)):
            (tmp_path / what).mkdir(exist_ok=True)
            shutil.move(path, tmp_path / what / folder)
    request = ["build-nvfp4", "--preset", "none", "--export", tmp_path / "export", "--base", tmp_path / "base"]
    outcome = run_mopt(*request, "--output", tmp_path / "out")
    assert outcome.report is not None and outcome.exit_code == 3, outcome.stderr
    found = {fault["code"]: fault["names"] for fault in outcome.report["error"]["faults"]}
    first, second = f"transformer/{packed[0]}", f"transformer_2/{packed[1]}"
    assert found == {"export.missing_weight_scale": [first], "check.proof": [second]}


def test_headers_alone_are_told_where_a_pattern_is_wrong_too(exports: Path, tmp_path: Path) -> None:
    """Which modules the pattern was to keep is unknown, and so whose data may be at fault."""
    kinds, module = MIXED["nvfp4"], quantized(exports / "nvfp4")[0]
    where = {"no input_scale": [module], "a wrong code": [quantized(exports / "nvfp4")[1]]}
    source, base = planted(exports / "nvfp4", exports / "base", tmp_path, kinds, where)
    request = ["build-nvfp4", "--preset", "none", "--export", source, "--base", base, "--keep-bf16", "no.such"]
    outcome = run_mopt(*request, "--output", tmp_path / "out")
    assert outcome.report is not None and outcome.exit_code == 3, outcome.stderr
    codes = {fault["code"] for fault in outcome.report["error"]["faults"]}
    assert codes == {"preset.no_match", "export.missing_input_scale"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", COMMANDS)
def test_what_the_hints_say_makes_the_build_succeed(algorithm: str, seed: int, exports: Path, tmp_path: Path) -> None:
    """Scales are missing in some modules, and unusable in others; members of fused groups among them."""
    draw = random.Random(f"{algorithm} {seed}")
    kinds = MIXED[algorithm] | {"a scale of 0": ("export.unusable_scale", filled("input_scale", 0.0))}
    chosen = ["no input_scale", "no weight_scale", "a scale of 0"]
    request = [COMMANDS[algorithm], "--preset", "flux1-dev", "--base", exports / "base"]
    plan = run_mopt(*request, "--export", exports / algorithm, "--output", tmp_path / "plan", "--dry-run").report
    assert plan is not None
    kept = [name for name, fate in plan["ledger"]["export"].items() if fate.startswith("kept")]
    packed = sorted({module_of(name) for name in kept if name.endswith(".input_scale")})
    draw.shuffle(packed)
    where = {kind: packed[3 * number : 3 * number + 3] for number, kind in enumerate(chosen)}
    source, _ = planted(exports / algorithm, exports / "base", tmp_path, kinds, where)
    refused = run_mopt(*request, "--export", source, "--output", tmp_path / "out")
    refused_for(refused, {name: code for name, (code, _) in kinds.items()}, where)
    assert refused.report is not None
    options = [
        option
        for fault in refused.report["error"]["faults"]
        for option in re.findall(r"--keep-bf16 '([^']*)'", fault["hint"])
    ]
    assert len(options) <= 9 * 4
    more = [word for option in dict.fromkeys(options) for word in ("--keep-bf16", option)]
    built = run_mopt(*request, "--export", source, "--output", tmp_path / "out", *more)
    assert built.exit_code == 0, built.stderr
