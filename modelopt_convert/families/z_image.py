"""Z-Image, as ComfyUI has it; its own repository has diffusers' names. Pure, no torch.

The names are those of diffusers' ``convert_z_image_transformer_checkpoint_to_diffusers``
(loaders/single_file_utils.py).
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import module, norm, parameter, same, thirds, within

_BLOCK = (
    thirds("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    module("attention.out", "attention.to_out.0"),
    norm("attention.q_norm", "attention.norm_q"),
    norm("attention.k_norm", "attention.norm_k"),
    *same(
        *(f"feed_forward.w{number}" for number in (1, 2, 3)),
        *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
        "adaLN_modulation.0",
    ),
)
_STACKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}", "siglip_refiner.{}")
Z_IMAGE = Family(
    "z_image",
    "Z-Image",
    ("ZImageTransformer2DModel",),
    (
        module("x_embedder", "all_x_embedder.2-1"),
        *same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
        *same("siglip_embedder.0", "siglip_embedder.1"),
        parameter("x_pad_token"),
        parameter("cap_pad_token"),
        parameter("siglip_pad_token"),
        *(row for stack in _STACKS for row in within(stack, stack, _BLOCK)),
        module("final_layer.linear", "all_final_layer.2-1.linear"),
        module("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
    # Lumina 2 has most of these names; its blocks' modulation is another member.
    marks=(
        "all_x_embedder.2-1",
        "cap_embedder.1",
        "noise_refiner.0.attention.to_q",
        "layers.0.attention.to_q",
        "layers.0.adaLN_modulation.0",
        "all_final_layer.2-1.linear",
    ),
    spellings=("diffusers", "comfyui"),
    beside={"norm_final.": "a norm that the model does not have"},
)
