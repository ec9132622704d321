"""HunyuanVideo, whose own names differ from ComfyUI's. Pure, no torch.

The names are those of diffusers' ``convert_hunyuan_video_transformer_to_diffusers`` (loaders/single_file_utils.py), and
ComfyUI's those that its class has.
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import Row, columns_and_rest, module, norm, thirds, within

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def _embedder(native: str, name: str, original: str) -> list[Row]:
    first, second = original.split()
    return [
        module(f"{native}.in_layer", f"{name}.linear_1", f"{native}.{first}"),
        module(f"{native}.out_layer", f"{name}.linear_2", f"{native}.{second}"),
    ]


def _stream(native: str, context: str, qkv: tuple[str, str, str], out: str, query: str, key: str) -> list[Row]:
    """Image or text in a block of both."""
    return [
        module(f"{native}_mod.lin", f"norm1{context}.linear", f"{native}_mod.linear"),
        thirds(f"{native}_attn.qkv", qkv, f"{native}_attn_qkv"),
        norm(f"{native}_attn.norm.query_norm", f"attn.{query}", f"{native}_attn_q_norm"),
        norm(f"{native}_attn.norm.key_norm", f"attn.{key}", f"{native}_attn_k_norm"),
        module(f"{native}_attn.proj", f"attn.{out}", f"{native}_attn_proj"),
        module(f"{native}_mlp.0", f"ff{context}.net.0.proj", f"{native}_mlp.fc1"),
        module(f"{native}_mlp.2", f"ff{context}.net.2", f"{native}_mlp.fc2"),
    ]


_DOUBLE = (
    *_stream("img", "", _QKV, "to_out.0", "norm_q", "norm_k"),
    *_stream(
        "txt",
        "_context",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "to_add_out",
        "norm_added_q",
        "norm_added_k",
    ),
)
_SINGLE = (
    columns_and_rest("linear1", (*_QKV, "proj_mlp")),
    module("linear2", "proj_out"),
    module("modulation.lin", "norm.linear", "modulation.linear"),
    norm("norm.query_norm", "attn.norm_q", "q_norm"),
    norm("norm.key_norm", "attn.norm_k", "k_norm"),
)
_REFINER = (
    module("norm1", "norm1"),
    module("norm2", "norm2"),
    thirds("self_attn.qkv", _QKV, "self_attn_qkv"),
    module("self_attn.proj", "attn.to_out.0", "self_attn_proj"),
    module("mlp.0", "ff.net.0.proj", "mlp.fc1"),
    module("mlp.2", "ff.net.2", "mlp.fc2"),
    module("adaLN_modulation.1", "norm_out.linear"),
)
_TEXT = (
    module("input_embedder", "proj_in"),
    *_embedder("t_embedder", "time_text_embed.timestep_embedder", "mlp.0 mlp.2"),
    *_embedder("c_embedder", "time_text_embed.text_embedder", "linear_1 linear_2"),
    *within("individual_token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}", _REFINER),
)
HUNYUAN_VIDEO = Family(
    "hunyuan_video",
    "HunyuanVideo",
    ("HunyuanVideoTransformer3DModel",),
    (
        module("img_in.proj", "x_embedder.proj"),
        *_embedder("time_in", "time_text_embed.timestep_embedder", "mlp.0 mlp.2"),
        *_embedder("vector_in", "time_text_embed.text_embedder", "in_layer out_layer"),
        *_embedder("guidance_in", "time_text_embed.guidance_embedder", "mlp.0 mlp.2"),
        *within("txt_in", "context_embedder", _TEXT),
        *within("double_blocks.{}", "transformer_blocks.{}", _DOUBLE),
        *within("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE),
        module("final_layer.linear", "proj_out"),
        module("final_layer.adaLN_modulation.1", "norm_out.linear", swap="always"),
    ),
    marks=(
        "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1",
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
        "proj_out",
    ),
)
