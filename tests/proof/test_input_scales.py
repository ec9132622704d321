"""Input scales that calibration does not make are named; those that it makes are not."""

import random

import pytest

from modelopt_convert.proof.input_scales import odd_input_scales


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
