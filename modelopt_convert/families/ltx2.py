"""LTX-2, and how its own pipeline exports it (``X0Model``). Pure, no torch.

ModelOpt exports the original model, not diffusers' class: keys begin with ``velocity_model.``, or, merged with a whole
checkpoint for ComfyUI, with ``model.diffusion_model.`` beside the VAE and the rest. The names are those of diffusers'
``convert_ltx2_transformer_to_diffusers`` (loaders/single_file_utils.py), and for LTX-2.3 of its
``scripts/convert_ltx2_to_diffusers.py``.
"""

from modelopt_convert.families.family import Family
from modelopt_convert.families.rows import Row, module, parameter, same, within

_CONNECTORS = "the connectors, a component of their own"
_ATTENTION = (
    *same("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits"),
    module("q_norm", "norm_q"),
    module("k_norm", "norm_k"),
)
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_MODULATIONS = (
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
)
_MODULATION = same("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_BLOCK: tuple[Row, ...] = (
    *(row for name in _ATTENTIONS for row in within(name, name, _ATTENTION)),
    *same("ff.net.0.proj", "ff.net.2", "audio_ff.net.0.proj", "audio_ff.net.2"),
    parameter("scale_shift_table"),
    parameter("audio_scale_shift_table"),
    parameter("prompt_scale_shift_table"),
    parameter("audio_prompt_scale_shift_table"),
    parameter("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    parameter("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
)
LTX2 = Family(
    "ltx2",
    "LTX-2",
    ("LTX2VideoTransformer3DModel",),
    (
        module("patchify_proj", "proj_in"),
        module("audio_patchify_proj", "audio_proj_in"),
        *(row for native, name in _MODULATIONS for row in within(native, name, _MODULATION)),
        *same("caption_projection.linear_1", "caption_projection.linear_2"),
        *same("audio_caption_projection.linear_1", "audio_caption_projection.linear_2"),
        *within("transformer_blocks.{}", "transformer_blocks.{}", _BLOCK),
        *same("proj_out", "audio_proj_out"),
        parameter("scale_shift_table"),
        parameter("audio_scale_shift_table"),
        parameter("keyframes_abs_pos_embedding"),
    ),
    marks=(
        "proj_in",
        "audio_proj_in",
        "time_embed.linear",
        "transformer_blocks.0.audio_to_video_attn.to_q",
        "proj_out",
    ),
    beside={"video_embeddings_connector.": _CONNECTORS, "audio_embeddings_connector.": _CONNECTORS},
)
