"""Names and BF16 sets as SGLang 0.5.23 and ModelOpt's example have them: the oracle for presets.

The regular expressions and globs are those projects' own: presets are compared with them, not with themselves.
"""

import re
from collections.abc import Callable, Sequence

# tools/build_modelopt_fp8_transformer.py, DEFAULT_*_KEEP_BF16_PATTERNS: re.search on every spelling of a module.
FLUX1_FP8 = [
    r"^transformer_blocks\.\d+\.norm1\.linear$",
    r"^transformer_blocks\.\d+\.norm1_context\.linear$",
    r"^transformer_blocks\.\d+\.ff\.net\.0\.proj$",
    r"^transformer_blocks\.\d+\.ff\.net\.2$",
    r"^transformer_blocks\.\d+\.ff_context\.net\.0\.proj$",
    r"^transformer_blocks\.\d+\.ff_context\.net\.2$",
    r"^single_transformer_blocks\.\d+\.norm\.linear$",
]
FLUX2_FP8 = [
    r"^time_guidance_embed\.(timestep_embedder|guidance_embedder)\.linear_[12]$",
    r"^double_stream_modulation_(img|txt)\.linear$",
    r"^single_stream_modulation\.linear$",
    r"^x_embedder$",
    r"^context_embedder$",
    r"^norm_out\.linear$",
]
HUNYUANVIDEO_FP8 = [
    r"^context_embedder\.",
    r"^x_embedder\.proj$",
    r"^time_text_embed\.(timestep_embedder|guidance_embedder|text_embedder)\.linear_[12]$",
    r"^norm_out\.linear$",
    r"^proj_out$",
    r"^transformer_blocks\.\d+\.norm1\.linear$",
    r"^transformer_blocks\.\d+\.norm1_context\.linear$",
    r"^single_transformer_blocks\.\d+\.norm\.linear$",
]
QWEN_IMAGE_FP8 = [
    r"^img_in$",
    r"^txt_in$",
    r"^time_text_embed\.timestep_embedder\.linear_[12]$",
    r"^norm_out\.linear$",
    r"^proj_out$",
    r"^transformer_blocks\.\d+\.img_mlp\.net\.2$",
    r"^transformer_blocks\.\d+\.(img_mod|txt_mod)$",
]
_LTX2_ATTENTION = r"(attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)"
LTX2_FP8 = [
    r"^(audio_)?adaln_single\.emb\.timestep_embedder\.linear_[12]$",
    r"^(audio_)?adaln_single\.linear$",
    r"^audio_caption_projection\.linear_[12]$",
    r"^audio_patchify_proj$",
    r"^audio_proj_out$",
    r"^av_ca_(a2v_gate|audio_scale_shift|v2a_gate|video_scale_shift)_adaln_single\.emb\.timestep_embedder\.linear_[12]$",
    r"^av_ca_(a2v_gate|audio_scale_shift|v2a_gate|video_scale_shift)_adaln_single\.linear$",
    r"^caption_projection\.linear_[12]$",
    r"^patchify_proj$",
    r"^proj_out$",
    rf"^transformer_blocks\.(0|43|44|45|46|47)\.{_LTX2_ATTENTION}\.to_(q|k|v)$",
    rf"^transformer_blocks\.(0|43|44|45|46|47)\.{_LTX2_ATTENTION}\.to_out\.0$",
    r"^transformer_blocks\.(0|43|44|45|46|47)\.(ff|audio_ff)\.proj_(in|out)$",
]
# tools/build_modelopt_nvfp4_transformer.py: the star crosses dots, re.fullmatch.
FLUX1_NVFP4 = [
    "transformer_blocks.*.norm1.linear*",
    "transformer_blocks.*.norm1_context.linear*",
    "transformer_blocks.*.ff.net.0.proj*",
    "transformer_blocks.*.ff.net.2*",
    "transformer_blocks.*.ff_context.net.0.proj*",
    "transformer_blocks.*.ff_context.net.2*",
    "single_transformer_blocks.*.norm.linear*",
    "single_transformer_blocks.*.proj_mlp*",
]
# ltx2-nvfp4 of the closed PR #22738.
LTX2_NVFP4 = [
    *("patchify_proj", "audio_patchify_proj", "caption_projection*", "audio_caption_projection*"),
    *("adaln_single*", "audio_adaln_single*", "av_ca_video_scale_shift_adaln_single*", "av_ca_a2v_gate_adaln_single*"),
    *("av_ca_audio_scale_shift_adaln_single*", "av_ca_v2a_gate_adaln_single*", "proj_out", "audio_proj_out"),
    *("transformer_blocks.*.attn2.to_*", "transformer_blocks.*.audio_attn2.to_*"),
    *(
        f"transformer_blocks.{block}.{part}"
        for block in (0, 1, 2, 45, 46, 47)
        for part in (
            *("attn1.to_*", "audio_attn1.to_*", "audio_to_video_attn.to_*", "video_to_audio_attn.to_*"),
            *("ff.proj_*", "audio_ff.proj_*"),
        )
    ),
]
# No builder's: what runtime/models/dits/krea2.py makes as nn.Linear, without quantization.
KREA2_PLAIN = [
    r"^(img_in|time_mod_proj|text_fusion\.projector|final_layer\.linear)$",
    r"^(time_embed|txt_in)\.linear_[12]$",
]
# ModelOpt's examples/diffusers/quantization/utils.py: re.match, what it matches keeps its precision.
FLUX_FILTER = (
    r"(proj_out.*|.*(time_text_embed|context_embedder|x_embedder|norm_out|time_guidance_embed|stream_modulation).*)"
)
LTX_VIDEO_FILTER = (
    r".*(proj_in|time_embed|caption_projection|proj_out|patchify_proj|adaln_single|blocks\.(0|1|2|45|46|47)\.)"
)
WAN_FILTER = r".*(patch_embedding|condition_embedder|proj_out|blocks\.(0|1|2|37|38|39)\.).*"
# Of ModelOpt's open PR #1205.
Z_IMAGE_FILTER = r".*(x_embedder|t_embedder|cap_embedder|adaLN_modulation|final_layer)"
QWEN_FILTER = r"(?!transformer_blocks\.)|transformer_blocks\.(0|1|58|59)\."
DEFAULT_FILTER = (
    r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|pos_embed|time_text_embed"
    r"|context_embedder|norm_out|x_embedder).*"
)
NO_FILTER = r"(?!)"

# configs/models/dits/*.py and HUNYUANVIDEO_RUNTIME_NAME_REPLACEMENTS: disk name to the loader's, for modules.
_HUNYUANVIDEO = [
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1$", r"txt_in.t_embedder.mlp.fc_in"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2$", r"txt_in.t_embedder.mlp.fc_out"),
    (r"^context_embedder\.proj_in$", r"txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.linear_1$", r"txt_in.c_embedder.fc_in"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.linear_2$", r"txt_in.c_embedder.fc_out"),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_[qkv]$",
        r"txt_in.refiner_blocks.\1.self_attn_qkv",
    ),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0$",
        r"txt_in.refiner_blocks.\1.self_attn_proj",
    ),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0(?:\.proj)?$",
        r"txt_in.refiner_blocks.\1.mlp.fc_in",
    ),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2(?:\.proj)?$",
        r"txt_in.refiner_blocks.\1.mlp.fc_out",
    ),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.norm_out\.linear$",
        r"txt_in.refiner_blocks.\1.adaLN_modulation.linear",
    ),
    (r"^x_embedder\.proj$", r"img_in.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1$", r"time_in.mlp.fc_in"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", r"time_in.mlp.fc_out"),
    (r"^time_text_embed\.guidance_embedder\.linear_1$", r"guidance_in.mlp.fc_in"),
    (r"^time_text_embed\.guidance_embedder\.linear_2$", r"guidance_in.mlp.fc_out"),
    (r"^time_text_embed\.text_embedder\.linear_1$", r"vector_in.fc_in"),
    (r"^time_text_embed\.text_embedder\.linear_2$", r"vector_in.fc_out"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"double_blocks.\1.img_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"double_blocks.\1.txt_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"double_blocks.\1.img_attn_qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$", r"double_blocks.\1.txt_attn_qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0(?:\.proj)?$", r"double_blocks.\1.img_mlp.fc_in"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2(?:\.proj)?$", r"double_blocks.\1.img_mlp.fc_out"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0(?:\.proj)?$", r"double_blocks.\1.txt_mlp.fc_in"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2(?:\.proj)?$", r"double_blocks.\1.txt_mlp.fc_out"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp$", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear$", r"single_blocks.\1.modulation.linear"),
    (r"^norm_out\.linear$", r"final_layer.adaLN_modulation.linear"),
    (r"^proj_out$", r"final_layer.linear"),
]
_WAN = [
    (r"^patch_embedding$", r"patch_embedding.proj"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", r"condition_embedder.image_embedder.ff.fc_in"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", r"condition_embedder.image_embedder.ff.fc_out"),
    (r"^condition_embedder\.text_embedder\.linear_1$", r"condition_embedder.text_embedder.fc_in"),
    (r"^condition_embedder\.text_embedder\.linear_2$", r"condition_embedder.text_embedder.fc_out"),
    (r"^condition_embedder\.time_embedder\.linear_1$", r"condition_embedder.time_embedder.mlp.fc_in"),
    (r"^condition_embedder\.time_embedder\.linear_2$", r"condition_embedder.time_embedder.mlp.fc_out"),
    (r"^condition_embedder\.time_proj$", r"condition_embedder.time_modulation.linear"),
    (r"^blocks\.(\d+)\.attn1\.to_(q|k|v)$", r"blocks.\1.to_\2"),
    (r"^blocks\.(\d+)\.attn1\.to_out\.0$", r"blocks.\1.to_out"),
    (r"^blocks\.(\d+)\.attn2\.to_out\.0$", r"blocks.\1.attn2.to_out"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj$", r"blocks.\1.ffn.fc_in"),
    (r"^blocks\.(\d+)\.ffn\.net\.2$", r"blocks.\1.ffn.fc_out"),
]
_LTX2 = [
    (r"^proj_in$", r"patchify_proj"),
    (r"^time_embed\.(.*)$", r"adaln_single.\1"),
    (r"^audio_proj_in$", r"audio_patchify_proj"),
    (r"^audio_time_embed\.(.*)$", r"audio_adaln_single.\1"),
    (r"(.*)ff\.net\.0\.proj$", r"\1ff.proj_in"),
    (r"(.*)ff\.net\.2$", r"\1ff.proj_out"),
    (r"^av_cross_attn_video_scale_shift\.(.*)$", r"av_ca_video_scale_shift_adaln_single.\1"),
    (r"^av_cross_attn_audio_scale_shift\.(.*)$", r"av_ca_audio_scale_shift_adaln_single.\1"),
    (r"^av_cross_attn_video_a2v_gate\.(.*)$", r"av_ca_a2v_gate_adaln_single.\1"),
    (r"^av_cross_attn_audio_v2a_gate\.(.*)$", r"av_ca_v2a_gate_adaln_single.\1"),
]
_QWEN_IMAGE = [(r"(\.(img_mod|txt_mod))\.1$", r"\1")]
_Z_IMAGE = [
    (r"\.attention\.to_(q|k|v)$", r".attention.to_qkv"),
    (r"\.feed_forward\.w[13]$", r".feed_forward.w13"),
]
_FLUX1 = [(r"(\.audio_ff|\.ff)\.net\.0\.proj$", r"\1.proj_in"), (r"(\.audio_ff|\.ff)\.net\.2$", r"\1.proj_out")]
MAPPINGS: dict[str, list[tuple[str, str]]] = {
    "ChromaTransformer2DModel": [],  # it has no such class
    "CosmosTransformer3DModel": [],
    "FluxTransformer2DModel": _FLUX1,
    "Flux2Transformer2DModel": [],
    "HunyuanVideo15Transformer3DModel": [],
    "HunyuanVideoTransformer3DModel": _HUNYUANVIDEO,
    "Krea2Transformer2DModel": [],
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": [],
    "QwenImageTransformer2DModel": _QWEN_IMAGE,
    "SD3Transformer2DModel": [],
    "WanTransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


def spellings(module: str, class_name: str) -> set[str]:
    """A module's name on disk and in SGLang."""
    return {module} | {re.sub(pattern, new, module) for pattern, new in MAPPINGS[class_name]}


def matching(patterns: Sequence[str], class_name: str, *, globs: bool) -> Callable[[str], bool]:
    """Whether SGLang's builder would keep a module in BF16, given its disk name."""
    if globs:
        expressions = [re.compile(f"^(?:{pattern.replace('.', '[.]').replace('*', '.*')})$") for pattern in patterns]
    else:
        expressions = [re.compile(pattern) for pattern in patterns]
    return lambda module: any(
        expression.search(name) for expression in expressions for name in spellings(module, class_name)
    )
