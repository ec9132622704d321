"""Small diffusers transformers whose tensors mark their rows, and their way into a family's native names and back."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from modelopt_convert.families.family import Family, Spelling
from modelopt_convert.families.table import FAMILIES

Shapes = dict[str, tuple[int, ...]]
Marked = dict[str, torch.Tensor]
BY_NAME = {family.name: family for family in FAMILIES}
# diffusers' converters of FLUX.1, Chroma and HunyuanVideo know one width.
_WIDE = {"num_attention_heads": 24, "attention_head_dim": 128}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}
_WAN = _HEADS | {"num_layers": 2, "ffn_dim": 512}
# The class, and a config with every module that it can have.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1": (
        "FluxTransformer2DModel",
        _WIDE | {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "flux1 without guidance": ("FluxTransformer2DModel", _WIDE | {"num_layers": 1, "num_single_layers": 1}),
    "chroma": (
        "ChromaTransformer2DModel",
        _WIDE | {"num_layers": 2, "num_single_layers": 2, "approximator_layers": 2, "approximator_hidden_dim": 32},
    ),
    "flux2": ("Flux2Transformer2DModel", _HEADS | {"num_layers": 2, "num_single_layers": 2}),
    "wan": ("WanTransformer3DModel", _WAN),
    "wan image": (
        "WanTransformer3DModel",
        _WAN | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", _HEADS | {"num_layers": 2, "joint_attention_dim": 96}),
    "ltx2": ("LTX2VideoTransformer3DModel", {"num_layers": 2}),
    "z_image": ("ZImageTransformer2DModel", {"n_layers": 2}),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        _WIDE | {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_projection_dim": 128,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 4,
        },
    ),
}
# No converter of diffusers' knows these; the classes have them, and so must the tables.
OPTIONAL: dict[str, tuple[str, dict[str, Any]]] = {
    "wan first and last frame": (
        "WanTransformer3DModel",
        _WAN | {"image_dim": 64, "added_kv_proj_dim": 256, "pos_embed_seq_len": 514},
    ),
    "qwen_image layered": (
        "QwenImageTransformer2DModel",
        _HEADS | {"num_layers": 1, "joint_attention_dim": 96, "use_additional_t_cond": True},
    ),
    "ltx2 of 2.5": (
        "LTX2VideoTransformer3DModel",
        {
            "num_layers": 1,
            "use_keyframes_abs_pos_embedding": True,
            **dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True),
        },
    ),
    "z_image omni": ("ZImageTransformer2DModel", {"n_layers": 1, "siglip_feat_dim": 64}),
}


def family_of(model: str) -> Family:
    """The table of one of the models above."""
    return BY_NAME[model.split()[0]]


def shapes_of(class_name: str, config: Mapping[str, Any]) -> Shapes:
    """Every tensor of a diffusers class, which is made without memory."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def shapes(model: str) -> Shapes:
    """Every tensor of one of the models above."""
    return shapes_of(*(MODELS | OPTIONAL)[model])


def marked(model: str) -> Marked:
    """The model's tensors, one column wide, each row with a number that no other row of any tensor has."""
    found: Marked = {}
    first = 0
    for name, shape in shapes(model).items():
        found[name] = torch.arange(first, first + shape[0]).reshape(-1, *(1 for _ in shape[1:]))
        first += shape[0]
    return found


def halves_changed(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def to_native(family: Family, spelling: Spelling, tensors: Marked) -> Marked:
    """By the table: diffusers' tensors joined into native ones."""
    groups: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        place = family.native_tensor(name, spelling)
        assert place is not None, name
        native, member = place
        assert member not in groups.setdefault(native, {}), native
        groups[native][member] = name, tensor
    found: Marked = {}
    for native, parts in groups.items():
        assert sorted(parts) == list(range(len(parts))), native
        joined = torch.cat([parts[member][1] for member in range(len(parts))])
        found[native] = halves_changed(joined) if family.swapped(native.rpartition(".")[0]) else joined
    return found


def to_diffusers(family: Family, tensors: Marked, columns: Mapping[str, int]) -> Marked:
    """By the table: native tensors cut into diffusers' ones.

    Args:
        family: The table.
        tensors: Native tensors.
        columns: The columns of the modules' weights, by diffusers' names.
    """
    found: Marked = {}
    for native, tensor in tensors.items():
        names = family.tensor(native)
        assert names is not None, native
        module = native.rpartition(".")[0]
        held = family.members(module, len(tensor), columns[family.fused(module)[0]]) if len(names) > 1 else None
        parts = [tensor] if held is None else [tensor[one.first : one.first + one.rows] for one in held]
        for name, part in zip(names, parts, strict=True):
            assert name not in found, name
            found[name] = halves_changed(part) if family.swapped(module) else part
    return found


def columns_of(model: str) -> dict[str, int]:
    """The columns of every module with a matrix."""
    return {
        name.removesuffix(".weight"): shape[1]
        for name, shape in shapes(model).items()
        if name.endswith(".weight") and len(shape) == 2
    }
