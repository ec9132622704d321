"""FLUX.1 and Chroma, which is FLUX.1 with another source of its modulation. Pure, no torch.

The names are those of diffusers' ``convert_flux_transformer_checkpoint_to_diffusers`` and
``convert_chroma_transformer_checkpoint_to_diffusers`` (loaders/single_file_utils.py).
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import columns_and_rest, embedder, module, norm, same, thirds, within

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_CONTEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# What FLUX.1 and Chroma have in common.
_ENDS = (
    module("img_in", "x_embedder"),
    module("txt_in", "context_embedder"),
    module("final_layer.linear", "proj_out"),
)
_DOUBLE = (
    thirds("img_attn.qkv", _QKV),
    thirds("txt_attn.qkv", _CONTEXT_QKV),
    norm("img_attn.norm.query_norm", "attn.norm_q"),
    norm("img_attn.norm.key_norm", "attn.norm_k"),
    norm("txt_attn.norm.query_norm", "attn.norm_added_q"),
    norm("txt_attn.norm.key_norm", "attn.norm_added_k"),
    module("img_attn.proj", "attn.to_out.0"),
    module("txt_attn.proj", "attn.to_add_out"),
    module("img_mlp.0", "ff.net.0.proj"),
    module("img_mlp.2", "ff.net.2"),
    module("txt_mlp.0", "ff_context.net.0.proj"),
    module("txt_mlp.2", "ff_context.net.2"),
)
_SINGLE = (
    columns_and_rest("linear1", (*_QKV, "proj_mlp")),
    module("linear2", "proj_out"),
    norm("norm.query_norm", "attn.norm_q"),
    norm("norm.key_norm", "attn.norm_k"),
)
_BLOCKS = (
    *within("double_blocks.{}", "transformer_blocks.{}", _DOUBLE),
    *within("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE),
)


FLUX1 = Family(
    "flux1",
    "FLUX.1",
    ("FluxTransformer2DModel",),
    (
        *_ENDS,
        *_BLOCKS,
        *embedder("time_in", "time_text_embed.timestep_embedder"),
        *embedder("vector_in", "time_text_embed.text_embedder"),
        *embedder("guidance_in", "time_text_embed.guidance_embedder"),
        module("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
        module("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
        module("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
        module("final_layer.adaLN_modulation.1", "norm_out.linear", swap="always"),
    ),
    marks=(
        "x_embedder",
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
        "proj_out",
    ),
    original_norm="scale",
)
CHROMA = Family(
    "chroma",
    "Chroma",
    ("ChromaTransformer2DModel",),
    (
        *_ENDS,
        *_BLOCKS,
        *same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
        *embedder("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}"),
        norm("distilled_guidance_layer.norms.{}", "distilled_guidance_layer.norms.{}"),
    ),
    marks=(
        "x_embedder",
        "context_embedder",
        "distilled_guidance_layer.in_proj",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
        "proj_out",
    ),
    original_norm="scale",
)
