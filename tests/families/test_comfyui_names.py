"""The tables against the names and shapes that ComfyUI's own classes have."""

import json
from pathlib import Path
from typing import Any

import pytest
from native_names import Shapes, family_of, shapes_of

from modelopt_convert.families.family import Family
from modelopt_convert.families.table import left_out, recognise

# Recorded from ComfyUI, which is no package; its code is not here.
RECORDED: dict[str, Shapes] = {
    model: {name: tuple(shape) for name, shape in names.items()}
    for model, names in json.loads((Path(__file__).parent / "comfyui_names.json").read_text()).items()
    if model != "note"
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}
_WAN = _HEADS | {"num_layers": 1, "ffn_dim": 512}
# What diffusers' classes of the same sizes are made with.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", _WAN),
    "wan image": ("WanTransformer3DModel", _WAN | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256}),
    "qwen_image": ("QwenImageTransformer2DModel", _HEADS | {"num_layers": 1, "joint_attention_dim": 96}),
    "z_image": ("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        _HEADS
        | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
        | {"text_embed_dim": 96, "pooled_projection_dim": 48, "guidance_embeds": True},
    ),
    "ltx2": ("LTX2VideoTransformer3DModel", {"num_layers": 1}),
}


def columns(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


def in_diffusers(family: Family, recorded: Shapes) -> Shapes:
    """What the table makes of recorded names: diffusers' names, and the shape of each one's rows."""
    found: Shapes = {}
    for name, shape in recorded.items():
        names = family.tensor(name)
        assert names is not None, name
        module = name.rpartition(".")[0]
        width = columns(recorded.get(f"{module}.weight", shape))
        held = family.members(module, shape[0], width)
        rows = [shape[0]] if held is None else [one.rows for one in held]
        found |= {new: (count, *shape[1:]) for new, count in zip(names, rows, strict=True)}
    return found


@pytest.mark.parametrize("model", SAME)
def test_every_name_of_comfyui_is_one_of_diffusers_with_its_shape(model: str) -> None:
    """And the other way round: diffusers' class has none besides."""
    found = recognise(RECORDED[model])
    assert found is not None and found.family == family_of(model)
    assert found.spelling == {"wan": "original", "wan image": "original", "ltx2": "original"}.get(
        model, "diffusers" if model == "qwen_image" else "comfyui"
    )
    beside = {name for name in RECORDED[model] if left_out(name, found)}
    assert all("embeddings_connector" in name for name in beside) and bool(beside) == (model == "ltx2")
    inside = {name: shape for name, shape in RECORDED[model].items() if name not in beside}
    expected = shapes_of(*SAME[model])
    assert in_diffusers(found.family, inside) == expected


@pytest.mark.parametrize("model", SAME)
def test_the_table_gives_comfyuis_names_back(model: str) -> None:
    family = family_of(model)
    native = {family.native_tensor(name, "comfyui") for name in shapes_of(*SAME[model])}
    names = {place[0] for place in native if place is not None}
    assert None not in native
    assert names == {name for name in RECORDED[model] if "embeddings_connector" not in name}


def test_the_record_is_of_every_family_that_it_names() -> None:
    assert RECORDED.keys() == SAME.keys()
    assert min(map(len, RECORDED.values())) > 40
