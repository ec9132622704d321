"""Stable Diffusion 3 and 3.5. Pure, no torch.

The names are those of diffusers' ``convert_sd3_transformer_checkpoint_to_diffusers`` (loaders/single_file_utils.py). In
the last block the text is only read: its modulation makes one shift and one scale, in another order than diffusers'.
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import Row, module, norm, parameter, thirds, within

_QKV = ("to_q", "to_k", "to_v")


def _attention(native: str, name: str) -> list[Row]:
    rows = (
        thirds("qkv", _QKV),
        norm("ln_q", "norm_q"),
        norm("ln_k", "norm_k"),
        module("proj", "to_out.0"),
    )
    return within(native, name, rows)


_IMAGE = (
    *_attention("attn", "attn"),
    *_attention("attn2", "attn2"),
    module("mlp.fc1", "ff.net.0.proj"),
    module("mlp.fc2", "ff.net.2"),
    module("adaLN_modulation.1", "norm1.linear"),
)
_CONTEXT = (
    thirds("attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    norm("attn.ln_q", "attn.norm_added_q"),
    norm("attn.ln_k", "attn.norm_added_k"),
    module("attn.proj", "attn.to_add_out"),
    module("mlp.fc1", "ff_context.net.0.proj"),
    module("mlp.fc2", "ff_context.net.2"),
    module("adaLN_modulation.1", "norm1_context.linear", swap="last block"),
)
SD3 = Family(
    "sd3",
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    (
        module("x_embedder.proj", "pos_embed.proj"),
        parameter("pos_embed", "pos_embed.pos_embed"),
        module("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        module("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        module("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        module("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        module("context_embedder", "context_embedder"),
        *within("joint_blocks.{}.x_block", "transformer_blocks.{}", _IMAGE),
        *within("joint_blocks.{}.context_block", "transformer_blocks.{}", _CONTEXT),
        module("final_layer.linear", "proj_out"),
        module("final_layer.adaLN_modulation.1", "norm_out.linear", swap="always"),
    ),
    marks=(
        "pos_embed.proj",
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
        "transformer_blocks.0.attn.add_q_proj",
        "norm_out.linear",
        "proj_out",
    ),
)
