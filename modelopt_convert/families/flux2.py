"""FLUX.2. Pure, no torch.

The names are those of diffusers' ``convert_flux2_transformer_checkpoint_to_diffusers`` (loaders/single_file_utils.py).
diffusers keeps q, k, v and the MLP of a single block in one module, as the model's own files do.
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import embedder, module, norm, thirds, within

_DOUBLE = (
    thirds("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    thirds("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    norm("img_attn.norm.query_norm", "attn.norm_q"),
    norm("img_attn.norm.key_norm", "attn.norm_k"),
    norm("txt_attn.norm.query_norm", "attn.norm_added_q"),
    norm("txt_attn.norm.key_norm", "attn.norm_added_k"),
    module("img_attn.proj", "attn.to_out.0"),
    module("txt_attn.proj", "attn.to_add_out"),
    module("img_mlp.0", "ff.linear_in"),
    module("img_mlp.2", "ff.linear_out"),
    module("txt_mlp.0", "ff_context.linear_in"),
    module("txt_mlp.2", "ff_context.linear_out"),
)
_SINGLE = (
    module("linear1", "attn.to_qkv_mlp_proj"),
    module("linear2", "attn.to_out"),
    norm("norm.query_norm", "attn.norm_q"),
    norm("norm.key_norm", "attn.norm_k"),
)
FLUX2 = Family(
    "flux2",
    "FLUX.2",
    ("Flux2Transformer2DModel",),
    (
        module("img_in", "x_embedder"),
        module("txt_in", "context_embedder"),
        *embedder("time_in", "time_guidance_embed.timestep_embedder"),
        *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        module("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
        module("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
        module("single_stream_modulation.lin", "single_stream_modulation.linear"),
        *within("double_blocks.{}", "transformer_blocks.{}", _DOUBLE),
        *within("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE),
        module("final_layer.linear", "proj_out"),
        module("final_layer.adaLN_modulation.1", "norm_out.linear", swap="always"),
    ),
    marks=(
        "x_embedder",
        "context_embedder",
        "double_stream_modulation_img.linear",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "proj_out",
    ),
    original_norm="scale",
)
