"""What advice is worth on the trained pipeline, as make_advice.py measured it; a share of that is drawn again."""

import json
import sys
from typing import Any

import pytest
from root import LONG, ROOT

from modelopt_convert.fidelity.frontier import Item, best_within

RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "tiny_flux1_advice.json").read_text())
UNITS: list[dict[str, Any]] = RECORDED["units"]
KEYS = {"pictures": "drawn", "one forward": "score", "weight error": "weight_error", "truth": "effect"}


def chosen(key: str, share: str) -> set[str]:
    items = [Item(unit["name"], unit[key], unit["cost"]) for unit in UNITS]
    best = best_within(items, int(float(share) * sum(item.cost for item in items)))
    assert best is not None
    return set(best.keeps)


@pytest.mark.parametrize("share", RECORDED["shares"])
def test_what_was_measured_is_what_would_be_chosen(share: str) -> None:
    """Else the figures are of another choice: make_advice.py is to be run again."""
    for name, key in KEYS.items():
        assert chosen(key, share) == set(RECORDED["shares"][share][name]["keeps"]), name


@pytest.mark.parametrize("share", RECORDED["shares"])
def test_advice_is_as_good_as_the_truth_and_better_than_guesses(share: str) -> None:
    psnr = {name: one["psnr"] for name, one in RECORDED["shares"][share].items()}
    assert psnr["pictures"] >= psnr["truth"] - 0.5  # of the very pictures that judge
    guesses = [value for name, value in psnr.items() if name.startswith(("random", "weight"))]
    assert len(guesses) > 10 and psnr["pictures"] > max(guesses) and psnr["pictures"] > RECORDED["packed"]


def test_pictures_predict_the_true_effect_and_weights_do_not() -> None:
    sys.path.insert(0, str(ROOT / "scripts" / "make"))
    from make_advice import spearman

    found = {name: {unit["name"]: unit[key] for unit in UNITS} for name, key in KEYS.items()}
    truth = found["truth"]
    assert spearman(found["pictures"], truth) > 0.85 > spearman(found["one forward"], truth)
    assert spearman(found["weight error"], truth) < 0.4


def test_pictures_drawn_again_are_those_that_were_measured() -> None:
    """By diffusers itself, in batches; machines round differently, which trajectories enlarge."""
    sys.path.insert(0, str(ROOT / "scripts" / "make"))
    from make_advice import JUDGING, Tiny

    tiny = Tiny()
    for share in RECORDED["shares"] if LONG else ("0.25",):
        found = RECORDED["shares"][share]
        psnr = {name: tiny.psnr(found[name]["keeps"], JUDGING) for name in ("pictures", "weight error")}
        assert psnr["pictures"] > psnr["weight error"] + 1
        for name, value in psnr.items():
            assert value == pytest.approx(found[name]["psnr"], abs=1.0), (share, name)
