"""The tables against diffusers' own converters and classes: every tensor, and every row of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from native_names import (
    MODELS,
    OPTIONAL,
    Marked,
    columns_of,
    family_of,
    halves_changed,
    marked,
    shapes,
    to_diffusers,
    to_native,
)

from modelopt_convert.families.family import Family, Spelling
from modelopt_convert.families.table import recognise

CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "flux1": theirs.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": theirs.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    "wan": theirs.convert_wan_transformer_to_diffusers,
    "ltx2": theirs.convert_ltx2_transformer_to_diffusers,
    "z_image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    "hunyuan_video": theirs.convert_hunyuan_video_transformer_to_diffusers,
    "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
}
WITH_CONVERTER = [model for model in MODELS if model.split()[0] in CONVERTERS]


def counted(model: str) -> Family:
    found = recognise(shapes(model))
    assert found is not None
    return found.family


def differing(left: Marked, right: Marked) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("model", WITH_CONVERTER)
def test_diffusers_reads_what_the_table_joins(model: str) -> None:
    """In the names that diffusers' converter takes, which are the original ones."""
    tensors, family = marked(model), counted(model)
    native = to_native(family, "original", tensors)
    assert len(native) <= len(tensors)
    converted = CONVERTERS[family.name](dict(native))
    assert differing(converted, tensors) == []


@pytest.mark.parametrize("spelling", ["comfyui", "original", "diffusers"])
@pytest.mark.parametrize("model", [*MODELS, *OPTIONAL])
def test_there_and_back_every_row_is_in_its_place(model: str, spelling: Spelling) -> None:
    tensors, family = marked(model), counted(model)
    if spelling == "diffusers":
        assert [family.native_tensor(name, spelling) for name in tensors] == [(name, 0) for name in tensors]
        return
    native = to_native(family, spelling, tensors)
    assert sum(map(len, native.values())) == sum(map(len, tensors.values()))
    assert differing(to_diffusers(family, native, columns_of(model)), tensors) == []


@pytest.mark.parametrize("model", WITH_CONVERTER)
def test_a_table_without_its_swaps_is_found_out(model: str) -> None:
    """The oracle sees halves that did not change places, and norms that did not."""
    tensors, family = marked(model), counted(model)
    plain = replace(family, rows=tuple(row._replace(swap="never") for row in family.rows))
    wrong = differing(CONVERTERS[family.name](dict(to_native(plain, "original", tensors))), tensors)
    swapped = {"flux1": ["norm_out"], "flux2": ["norm_out"], "hunyuan_video": ["norm_out"]}
    swapped["sd3"] = ["transformer_blocks.2.norm1_context", "norm_out"]
    expected = {f"{module}.linear" for module in swapped.get(family.name, ())}
    assert {name.rpartition(".")[0] for name in wrong} == expected
    assert all(torch.equal(halves_changed(tensors[name]), CONVERTERS[family.name](dict(to_native(
        plain, "original", tensors)))[name]) for name in wrong)  # fmt: skip


def test_qwen_images_names_are_its_classes() -> None:
    """No converter is there, since there is nothing to convert."""
    family = family_of("qwen_image")
    names = list(shapes("qwen_image"))
    assert [family.native_tensor(name, "comfyui") for name in names] == [(name, 0) for name in names]
    assert not hasattr(theirs, "convert_qwen_image_transformer_to_diffusers")


@pytest.mark.parametrize("model", MODELS)
def test_the_class_is_the_familys(model: str) -> None:
    assert MODELS[model][0] in family_of(model).class_names
