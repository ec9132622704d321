"""The proof of the proof: real exports of six families, with planted faults. No verdict may be wrong."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import postprocess, reciprocal, swapped
from support import Tensors, edit, load, packed_in

from modelopt_convert import inspect
from modelopt_convert.report.inspect import InspectReport

FAMILIES = ("flux1", "flux2", "wan", "qwen_image", "hunyuan_video", "ltx2")


def permute_rows(tensors: Tensors, modules: list[str]) -> None:
    for module in modules:
        order = torch.randperm(len(tensors[f"{module}.weight"]), generator=torch.Generator().manual_seed(3))
        for role in ("weight", "weight_scale"):
            raw = tensors[f"{module}.{role}"].view(torch.uint8)[order]
            tensors[f"{module}.{role}"] = raw.view(tensors[f"{module}.{role}"].dtype)


def permute_one_tile(tensors: Tensors, modules: list[str]) -> None:
    for module in modules:
        weight = tensors[f"{module}.weight"]
        tile = min(128, len(weight))
        weight = weight.clone()
        weight[:tile] = weight[:tile].flip(0)
        tensors[f"{module}.weight"] = weight


def swap_and_swizzle(tensors: Tensors, modules: list[str]) -> None:
    swapped(tensors, modules)
    postprocess(tensors, modules)


def nothing(tensors: Tensors, modules: list[str]) -> None:
    pass


# Fault: what is planted, the truth (nibbles, scales, global scale) or None where the weights are not the base's.
FAULTS: dict[str, tuple[Callable[[Tensors, list[str]], None], tuple[str, str, str] | None]] = {
    "none": (nothing, ("low", "linear", "multiply")),
    "swapped": (swapped, ("high", "linear", "multiply")),
    "swizzled": (postprocess, ("low", "128x4", "multiply")),
    "both": (swap_and_swizzle, ("high", "128x4", "multiply")),
    "reciprocal": (reciprocal, ("low", "linear", "divide")),
    "rows permuted": (permute_rows, None),
    "one tile permuted": (permute_one_tile, ("low", "linear", "multiply")),
}


def everywhere(plant: Callable[[Tensors, list[str]], None]) -> Callable[[Tensors], None]:
    return lambda tensors: plant(tensors, sorted(packed_in(tensors)))


def look(source: Path, base: Path | None) -> InspectReport:
    return inspect(source, base=base, all_scales=True)


def score(report: InspectReport, truth: tuple[str, str, str] | None) -> Counter[str]:
    """Answers that are right, harmless (equivalent), undetermined or wrong."""
    counts: Counter[str] = Counter()
    for one in report.modules.values():
        for place, answer in enumerate((one.nibble_order, one.scale_layout, one.global_scale)):
            if answer in ("equivalent", "undetermined"):
                counts[answer] += 1
            elif truth is None:
                # Nothing may be decided of weights that are not the base's, save what the shape of the scales says.
                counts["right" if place == 1 and one.scale_basis == "shape" else "wrong"] += 1
            else:
                counts["right" if answer == truth[place] else "wrong"] += 1
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_verdict_is_wrong(families: Path, tmp_path: Path, family: str, fault: str) -> None:
    plant, truth = FAULTS[fault]
    source = edit(families / family / "nvfp4", tmp_path / "export", everywhere(plant))
    counts = score(look(source, families / family / "base"), truth)
    print(f"{family}, {fault}: {dict(counts)}")
    if truth is None:
        # A rare small module may resemble itself permuted only where its shape alone answers.
        assert counts["wrong"] == 0, counts
        return
    assert counts["wrong"] == 0, counts
    if fault != "one tile permuted":
        assert counts["undetermined"] == 0 and counts["right"] >= 0.95 * counts.total(), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_another_base_proves_nothing(families: Path, tmp_path: Path, family: str) -> None:
    def other(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(9)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                spread = tensor.float().std(dim=0)
                tensors[name] = (torch.randn(tensor.shape, generator=generator) * spread).to(tensor.dtype)

    base = edit(families / family / "base", tmp_path / "base", other)
    counts = score(look(families / family / "nvfp4", base), None)
    assert counts["wrong"] == 0, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_in_another_layout_is_found(families: Path, tmp_path: Path, family: str) -> None:
    odd = sorted(packed_in(load(families / family / "nvfp4/transformer")))[1]
    source = edit(families / family / "nvfp4", tmp_path / "export", lambda tensors: swap_and_swizzle(tensors, [odd]))
    report = look(source, families / family / "base")
    assert report.modules[odd].nibble_order == "high" and report.modules[odd].scale_layout == "128x4"
    others = [one for name, one in report.modules.items() if name != odd]
    assert {one.nibble_order for one in others} == {"low"} and "128x4" not in {one.scale_layout for one in others}
    assert report.layout.scale_layout == "mixed" and report.layout.nibble_order == "undetermined"
    assert report.layout.modules_contradicting == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["none", "swapped", "swizzled", "both"])
def test_without_a_base_no_hint_is_wrong_and_no_nibble_order_is_claimed(
    families: Path, tmp_path: Path, family: str, fault: str
) -> None:
    plant, truth = FAULTS[fault]
    assert truth is not None
    source = edit(families / family / "nvfp4", tmp_path / "export", everywhere(plant))
    for one in look(source, None).modules.values():
        assert one.nibble_order == "undetermined" and one.nibble_basis == "none"
        assert one.scale_layout in (truth[1], "equivalent", "undetermined")
        assert one.scale_basis in ("shape", "hint", "none")


def test_the_report_is_json_as_promised(families: Path) -> None:
    report = json.loads(look(families / "flux2/nvfp4", families / "flux2/base").to_json())
    assert report["schema"] == "mopt.inspect/1" and report["layout"]["modules_proven"] == len(report["modules"])
