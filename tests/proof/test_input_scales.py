"""Input scales that calibration does not make are named; those that it makes are not."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import PACKED
from support import Tensors, build, edit

from modelopt_convert.proof.input_scales import odd_input_scales

SIBLING = "transformer_blocks.0.attn.to_k"  # of a fused group


def calibrated(seed: int, count: int = 40) -> dict[str, float]:
    """Spread over two decades, as those of real exports."""
    source = random.Random(seed)
    return {f"blocks.{place}": 10 ** source.uniform(-3, -1) for place in range(count)}


WEIGHTS = {f"blocks.{place}": 1e-5 * (1 + place) for place in range(40)}


@pytest.mark.parametrize("seed", range(20))
def test_calibrated_scales_are_not_odd(seed: int) -> None:
    inputs = calibrated(seed)
    inputs["blocks.1"] = inputs["blocks.0"]
    assert list(odd_input_scales(inputs, WEIGHTS, [("blocks.0", "blocks.1", "kept")])) == []


@pytest.mark.parametrize(
    ("factor", "words"),
    [(2688.0, "an amax, and not a scale"), (1e-38, "three decades"), (1e5, "three decades"), (1e-4, "three decades")],
)
def test_one_that_is_far_off_is_named_with_its_value(factor: float, words: str) -> None:
    inputs = dict.fromkeys(WEIGHTS, 0.01) | {"blocks.0": 0.011}
    place = f"blocks.{random.Random(factor).randrange(1, 40)}"
    inputs[place] *= factor
    (found,) = odd_input_scales(inputs, WEIGHTS, [])
    assert found.startswith(f"{place}: input_scale {inputs[place]:.6g} ") and words in found


def test_copies_of_weight_scales_are_counted() -> None:
    inputs = calibrated(1) | {name: WEIGHTS[name] for name in ("blocks.7", "blocks.9")}
    found = list(odd_input_scales(inputs, WEIGHTS, []))
    assert found[0].startswith("blocks.7 first: the input_scale of 2 modules is their weight's scale")


def test_siblings_that_read_one_input_have_one_scale() -> None:
    inputs = calibrated(2) | {"a.to_q": 0.01, "a.to_k": 0.02, "a.to_v": 0.01}
    (found,) = odd_input_scales(inputs, WEIGHTS, [("a.to_q", "a.to_k", "a.to_v")])
    assert found == "a.to_q, a.to_k, a.to_v: they read one input, and their input scales differ 2.000x"


def test_all_of_one_value_are_not_calibrated() -> None:
    (found,) = odd_input_scales(dict.fromkeys(WEIGHTS, 1.0), WEIGHTS, [])
    assert found == "all 40 modules have one input_scale, 1: not calibrated"
    assert list(odd_input_scales({"a": 1.0, "b": 1.0}, {}, [])) == []


def _copied(tensors: Tensors, module: str) -> None:
    tensors[f"{module}.input_scale"] = tensors[f"{module}.weight_scale_2"].clone()


def _times(factor: float) -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, module: str) -> None:
        tensors[f"{module}.input_scale"] = tensors[f"{module}.input_scale"] * factor

    return change


def _all_equal(tensors: Tensors, module: str) -> None:
    for name in tensors:
        if name.endswith(".input_scale"):
            tensors[name] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "module"),
    [
        (_copied, PACKED),
        (_times(6 * 448), PACKED),
        (_times(1e-30), PACKED),
        (_times(1e5), PACKED),
        (_times(2.0), SIBLING),
        (_all_equal, ""),
    ],
    ids=["copied", "raw amax", "tiny", "huge", "sibling doubled", "all equal"],
)
def test_a_build_tells_what_is_odd(
    change: Callable[[Tensors, str], None], module: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """With the figure; nothing is said of what calibration made."""
    export = edit(nvfp4, tmp_path / "export", lambda tensors: change(tensors, module))
    outcome = build(export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    told = [one["message"] for one in outcome.report["warnings"] if one["code"] == "export.odd_input_scale"]
    assert told and all(module in words and re.search(r"\d", words) for words in told)
    if module == SIBLING:
        usual = build(nvfp4, base, tmp_path / "usual").report
        assert usual is not None
        assert "export.odd_input_scale" not in {one["code"] for one in usual["warnings"]}
