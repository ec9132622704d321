"""Right exports that are not plain max calibration are built and verified for what they are; other weights are not.

Through the public API alone, on one export that has a module of every kind of weight.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import QUANTIZATION_CONFIG, entries, write_transformer
from producers import FP8_PRODUCERS, NVFP4_PRODUCERS, VERDICTS, Packed, PackedFp8, fp8_f16, max_calibration
from support import Tensors
from torch import Tensor
from weights import DISTRIBUTIONS, weight

import modelopt_convert
from modelopt_convert import CheckFailedError

CLASS = {"_class_name": "SmallTransformer"}
SHAPE = (144, 128)
TRAINED = ("gaussian", "outlier_channels")  # kinds on which no producer happens to do what max calibration does
RIGHT = [name for name, one in NVFP4_PRODUCERS.items() if VERDICTS.index(one.verdict) <= VERDICTS.index("nearest")]
WRONG = [name for name in NVFP4_PRODUCERS if name not in RIGHT]
RIGHT_FP8 = [name for name, one in FP8_PRODUCERS.items() if VERDICTS.index(one.verdict) <= VERDICTS.index("nearest")]
WRONG_FP8 = [name for name in FP8_PRODUCERS if name not in RIGHT_FP8]

Made = Packed | PackedFp8


def bases(kinds: tuple[str, ...] = tuple(DISTRIBUTIONS)) -> dict[str, Tensor]:
    return {f"blocks.{number}.{kind}": weight(kind, *SHAPE, number) for number, kind in enumerate(kinds)}


def lay(
    folder: Path, weights: dict[str, Tensor], make: Callable[[Tensor], Made], dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """An export and its base; ``dtype`` is what the exporter loaded the model in."""
    tensors: Tensors = {"norm.weight": torch.ones(8, dtype=dtype)}
    algorithm = "NVFP4"
    for number, (module, base) in enumerate(weights.items()):
        made = make(base.to(dtype))
        algorithm = "NVFP4" if isinstance(made, Packed) else "FP8"
        roles = ("weight", "weight_scale", "weight_scale_2")
        tensors |= {f"{module}.{role}": tensor for role, tensor in zip(roles, made, strict=False)}
        tensors[f"{module}.input_scale"] = torch.tensor(0.01 + 0.001 * number)
    stored = {f"{module}.weight": base for module, base in weights.items()}
    stored["norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    config = CLASS | {"quantization_config": QUANTIZATION_CONFIG | {"quant_algo": algorithm}}
    return write_transformer(folder / "export", tensors, config), write_transformer(folder / "base", stored, CLASS)


def build(export: Path, base: Path, output: Path, **more: Any) -> Any:
    algorithm = json.loads((export / "config.json").read_text())["quantization_config"]["quant_algo"]
    command = modelopt_convert.build_nvfp4 if algorithm == "NVFP4" else modelopt_convert.convert_fp8
    return command(export=export, base=base, output=output, preset="none", **more)


def verdicts(report: Any) -> dict[str, str]:
    """The verdict of each module, as the JSON report has it."""
    return {name: one["verdict"] for name, one in json.loads(report.model_dump_json())["proof"]["modules"].items()}


def passes(export: Path, base: Path, room: Path, weakest: str) -> dict[str, str]:
    """Require that it is built, and verified with its record and without."""
    report = build(export, base, room / "out")
    found = verdicts(report)
    assert report.exit_code == 0
    assert {module: one for module, one in found.items() if VERDICTS.index(one) > VERDICTS.index(weakest)} == {}
    assert modelopt_convert.verify(room / "out", base=base, sample="all").exit_code == 0
    (room / "out" / "mopt.json").unlink()
    assert modelopt_convert.verify(room / "out", base=base).exit_code == 0
    return found


def is_refused(export: Path, base: Path, room: Path) -> None:
    """Require exit 1 and no output."""
    with pytest.raises(CheckFailedError) as caught:
        build(export, base, room / "out")
    assert caught.value.exit_code == 1 and entries(room) == {}


def is_accepted_as_near(export: Path, base: Path, room: Path) -> None:
    """Require that it is built where that is asked for, and proven neither then nor later."""
    report = build(export, base, room / "out", accept_near=True)
    assert report.exit_code == 0 and set(verdicts(report).values()) == {"near"}
    with pytest.raises(CheckFailedError):
        modelopt_convert.verify(room / "out", base=base)


@pytest.mark.parametrize("name", RIGHT)
def test_right_exports_pass(name: str, tmp_path: Path, room: Path) -> None:
    """Zero blocks, outliers, sparse and ternary weights among them."""
    producer = NVFP4_PRODUCERS[name]
    found = passes(*lay(tmp_path, bases(), producer.make), room, producer.verdict)
    assert len(found) == len(DISTRIBUTIONS)
    if producer.verdict == "nearest":
        assert {found[module] for module in found if module.endswith(TRAINED)} == {"nearest"}


@pytest.mark.parametrize("name", RIGHT_FP8)
def test_right_fp8_exports_pass(name: str, tmp_path: Path, room: Path) -> None:
    producer = FP8_PRODUCERS[name]
    found = passes(*lay(tmp_path, bases(), producer.make), room, producer.verdict)
    assert {found[module] for module in found if module.endswith(TRAINED)} == {producer.verdict}


@pytest.mark.parametrize("make", [max_calibration, fp8_f16])
def test_exports_that_loaded_the_model_in_half_pass(make: Callable[[Tensor], Made], tmp_path: Path, room: Path) -> None:
    """Small values lose bits in F16's subnormals."""
    weights = bases()
    assert any(not torch.equal(base.half().bfloat16(), base) for base in weights.values())
    passes(*lay(tmp_path, weights, make, torch.float16), room, "reproduced")


@pytest.mark.parametrize("factor", [1.0 + 2.0**-23, 1.7])
def test_a_tensor_scale_chosen_otherwise_is_warned_of(factor: float, tmp_path: Path, room: Path) -> None:
    """Also one ulp; and verify passes with the same words."""

    def make(base: Tensor) -> Packed:
        return max_calibration(base, max_calibration(base).global_scale * factor)

    export, base = lay(tmp_path, bases(("gaussian",)), make)
    report = build(export, base, room / "out")
    (words,) = (one["message"] for one in report.warnings if one["code"] == "proof.scale_factor")
    assert "1 modules have a tensor scale that is not max calibration's (blocks.0.gaussian first)" in words
    verified = modelopt_convert.verify(room / "out", base=base)
    assert verified.exit_code == 0
    levels = json.loads(verified.model_dump_json())["verify"]["levels"]
    assert [one["warnings"] for one in levels if one["level"] == "L2"] == [[words]]


def test_idle_scales_are_counted_and_warned_of(tmp_path: Path, room: Path) -> None:
    def make(base: Tensor) -> Packed:
        one = max_calibration(base)
        one.scale.view(torch.uint8)[:4] = torch.arange(16, 16 + one.scale.shape[1]).to(torch.uint8)
        return one

    weights = bases(("gaussian",))
    weights["blocks.0.gaussian"][:4] = 0
    export, base = lay(tmp_path, weights, make)
    report = build(export, base, room / "out")
    (module,) = json.loads(report.model_dump_json())["proof"]["modules"].values()
    (words,) = (one["message"] for one in report.warnings if one["code"] == "proof.scale_factor")
    assert (module["verdict"], module["scales_idle"]) == ("nearest", 32) and words.startswith("32 idle scales in 1")
    assert modelopt_convert.verify(room / "out", base=base).exit_code == 0


@pytest.mark.parametrize("name", WRONG)
def test_other_weights_are_refused(name: str, tmp_path: Path, room: Path) -> None:
    is_refused(*lay(tmp_path, bases(TRAINED), NVFP4_PRODUCERS[name].make), room)


@pytest.mark.parametrize("name", WRONG_FP8)
def test_other_fp8_weights_are_refused(name: str, tmp_path: Path, room: Path) -> None:
    is_refused(*lay(tmp_path, bases(TRAINED), FP8_PRODUCERS[name].make), room)


@pytest.mark.parametrize("name", WRONG)
def test_other_weights_can_be_accepted_and_are_not_proven(name: str, tmp_path: Path, room: Path) -> None:
    """Where no column is so small that others' errors, which GPTQ puts there, are more than the column."""
    is_accepted_as_near(*lay(tmp_path, bases(("gaussian",)), NVFP4_PRODUCERS[name].make), room)


@pytest.mark.parametrize("name", WRONG_FP8)
def test_other_fp8_weights_can_be_accepted_and_are_not_proven(name: str, tmp_path: Path, room: Path) -> None:
    is_accepted_as_near(*lay(tmp_path, bases(("gaussian",)), FP8_PRODUCERS[name].make), room)
