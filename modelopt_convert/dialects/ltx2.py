"""LTX-2 as its own pipeline exports it (``X0Model``): the names, and diffusers' names for the same. Pure, no torch.

ModelOpt exports the original model, not diffusers' class: keys begin with ``velocity_model.``, or, merged with a whole
checkpoint for ComfyUI, with ``model.diffusion_model.`` beside the VAE and the rest. The names are those of diffusers'
``convert_ltx2_transformer_to_diffusers`` (loaders/single_file_utils.py).
"""

from collections.abc import Iterable, Mapping

from modelopt_convert.run.errors import InputError

CLASS_NAME = "X0Model"
_PREFIXES = ("velocity_model.", "model.diffusion_model.")
_CONNECTORS = ("video_embeddings_connector", "audio_embeddings_connector")
_SEGMENTS: Mapping[str, str] = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def diffusers_name(name: str) -> str | None:
    """The diffusers name of a tensor or module of an X0Model, or None if it is not part of the transformer."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return None
    segments = name.removeprefix(prefix).split(".")
    if segments[0] in _CONNECTORS:
        return None
    return ".".join(_SEGMENTS.get(segment, segment) for segment in segments)


def diffusers_names(names: Iterable[str], *, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sort an X0Model's tensors.

    Returns:
        The diffusers name of each tensor of the transformer, and the fate of each other one.

    Raises:
        InputError: ``export.naming``: two tensors would get one name.
    """
    renamed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        new = diffusers_name(name)
        if new is None:
            connector = any(f"{part}." in name for part in _CONNECTORS)
            what = "connectors are a component of their own" if connector else "not part of the transformer"
            left_out[name] = f"left out: {what}"
        elif new in taken:
            raise InputError(
                f"{path}: tensors {taken[new]!r} and {name!r} are both {new!r} in diffusers' naming",
                code="export.naming",
                path=path,
                hint="two exports are mixed in one file; export again",
            )
        else:
            taken[new] = name
            renamed[name] = new
    return renamed, left_out
