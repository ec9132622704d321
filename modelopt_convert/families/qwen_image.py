"""Qwen-Image, which everyone calls the same. Pure, no torch."""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import same, within

_ATTENTION = (
    "norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj",
    "add_v_proj", "to_out.0", "to_add_out",
)  # fmt: skip
_STREAM = ("mod.1", "mlp.net.0.proj", "mlp.net.2")
_BLOCK = same(
    *(f"attn.{name}" for name in _ATTENTION),
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in _STREAM),
)
QWEN_IMAGE = Family(
    "qwen_image",
    "Qwen-Image",
    ("QwenImageTransformer2DModel",),
    (
        *same(
            "img_in",
            "txt_in",
            "txt_norm",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
            "time_text_embed.addition_t_embedding",
            "norm_out.linear",
            "proj_out",
        ),
        *within("transformer_blocks.{}", "transformer_blocks.{}", _BLOCK),
    ),
    marks=(
        "img_in",
        "txt_in",
        "txt_norm",
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.0.attn.add_q_proj",
        "proj_out",
    ),
    spellings=("diffusers", "comfyui"),
)
