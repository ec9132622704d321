"""Wan 2.1 and 2.2, text-to-video and image-to-video. Pure, no torch.

The names are those of diffusers' ``convert_wan_transformer_to_diffusers`` (loaders/single_file_utils.py), and of its
``scripts/convert_wan_to_diffusers.py`` for the position embedding of first-and-last-frame models. A block's second and
third norm change places.
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import module, parameter, same, within

_ATTENTION = (
    module("q", "to_q"),
    module("k", "to_k"),
    module("v", "to_v"),
    module("o", "to_out.0"),
    *same("norm_q", "norm_k"),
)
_BLOCK = (
    *within("self_attn", "attn1", _ATTENTION),
    *within("cross_attn", "attn2", _ATTENTION),
    module("cross_attn.k_img", "attn2.add_k_proj"),
    module("cross_attn.v_img", "attn2.add_v_proj"),
    module("cross_attn.norm_k_img", "attn2.norm_added_k"),
    module("ffn.0", "ffn.net.0.proj"),
    module("ffn.2", "ffn.net.2"),
    module("norm1", "norm1"),
    module("norm2", "norm3"),
    module("norm3", "norm2"),
    parameter("modulation", "scale_shift_table"),
)
_IMAGE = "condition_embedder.image_embedder"
WAN = Family(
    "wan",
    "Wan",
    ("WanTransformer3DModel",),
    (
        module("patch_embedding", "patch_embedding"),
        module("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        module("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        module("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        module("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        module("time_projection.1", "condition_embedder.time_proj"),
        module("img_emb.proj.0", f"{_IMAGE}.norm1"),
        module("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj"),
        module("img_emb.proj.3", f"{_IMAGE}.ff.net.2"),
        module("img_emb.proj.4", f"{_IMAGE}.norm2"),
        parameter("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
        *within("blocks.{}", "blocks.{}", _BLOCK),
        module("head.head", "proj_out"),
        parameter("head.modulation", "scale_shift_table"),
    ),
    marks=(
        "patch_embedding",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.time_proj",
        "blocks.0.attn1.to_q",
        "proj_out",
    ),
)
