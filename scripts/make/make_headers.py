"""Write tests/preset/headers/<preset>.json: names, dtypes and shapes of every preset's real model, without its weights.

    python scripts/make/make_headers.py

diffusers' own classes make them on the meta device, from the published config.json. Needs the ``modelopt`` extra.
Blocks that are alike are one entry: ``blocks.{0-39}.norm2.weight`` stands for forty tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent.parent / "tests" / "preset" / "headers"
Tensors = Mapping[str, tuple[str, list[int]]]

_FLUX1 = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_WAN = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
# Of Z-Image and Z-Image-Turbo; copies of the files on the Hub have these.
_Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
# Public notes that quote the file of Qwen-Image-Edit give these and 20,430,401,088 parameters.
_QWEN = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_FLUX2 = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
_KLEIN_9B = _FLUX2 | {
    "guidance_embeds": False,
    "joint_attention_dim": 12288,
    "num_attention_heads": 32,
    "num_single_layers": 24,
    "out_channels": None,
}
_KLEIN_4B = _KLEIN_9B | {
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
}
_SD35 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_SD35_LARGE = _SD35 | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
}
# diffusers' defaults, which are the sizes that the models' cards and SGLang's configs/models/dits/krea2.py give.
_KREA2 = {
    "_class_name": "Krea2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 48, 48],
    "in_channels": 64,
    "intermediate_size": 16384,
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_key_value_heads": 12,
    "num_layers": 28,
    "num_layerwise_text_blocks": 2,
    "num_refiner_text_blocks": 2,
    "num_text_layers": 12,
    "rope_theta": 1000.0,
    "text_hidden_dim": 2560,
    "text_intermediate_size": 6912,
    "text_num_attention_heads": 20,
    "text_num_key_value_heads": 20,
    "timestep_embed_dim": 256,
}

# As diffusers' scripts/convert_hunyuan_video1_5_to_diffusers.py writes them; the sizes differ in target_size alone.
_HUNYUANVIDEO_15 = {
    "_class_name": "HunyuanVideo15Transformer3DModel",
    "attention_head_dim": 128,
    "image_embed_dim": 1152,
    "in_channels": 65,
    "mlp_ratio": 4.0,
    "num_attention_heads": 16,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "out_channels": 32,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "target_size": 640,
    "text_embed_2_dim": 1472,
    "text_embed_dim": 3584,
    "use_meanflow": False,
}
# As diffusers' scripts/convert_cosmos_to_diffusers.py writes them: Cosmos-Predict2 of 2B.
_COSMOS = {
    "_class_name": "CosmosTransformer3DModel",
    "adaln_lora_dim": 256,
    "attention_head_dim": 128,
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "in_channels": 16,
    "max_size": [128, 240, 240],
    "mlp_ratio": 4.0,
    "num_attention_heads": 16,
    "num_layers": 28,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "rope_scale": [1.0, 4.0, 4.0],
    "text_embed_dim": 1024,
}
_COSMOS_1 = _COSMOS | {"extra_pos_embed_type": "learnable", "num_attention_heads": 32, "rope_scale": [2.0, 1.0, 1.0]}
_COSMOS_25 = _COSMOS | {
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
    "in_channels": 17,
    "rope_scale": [1.0, 3.0, 3.0],
    "use_crossattn_projection": True,
}
_LTX_VIDEO = {
    "_class_name": "LTXVideoTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "attention_out_bias": True,
    "caption_channels": 4096,
    "cross_attention_dim": 2048,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 28,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
# As diffusers' scripts/convert_ltx2_to_diffusers.py writes version 2.0. Whether the published file has the keys of
# LTX-2.3 (gated_attn and the like) is not known; they are left out, and their defaults change no tensor.
_LTX2 = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_out_bias": True,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_hop_length": 160,
    "audio_in_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000,
    "audio_scale_factor": 4,
    "base_height": 2048,
    "base_width": 2048,
    "caption_channels": 3840,
    "causal_offset": 1,
    "cross_attention_dim": 4096,
    "cross_attn_timestep_scale_multiplier": 1000,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 48,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "pos_embed_max_pos": 20,
    "qk_norm": "rms_norm_across_heads",
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "rope_type": "split",
    "timestep_scale_multiplier": 1000,
    "vae_scale_factors": [8, 32, 32],
}
_LTX23 = _LTX2 | {
    "audio_cross_attn_mod": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "gated_attn": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}

# The published transformer/config.json of each, less the keys that say who wrote the file.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "flux1-dev": _FLUX1,
    "flux1-schnell": _FLUX1 | {"guidance_embeds": False},
    # That the published file spells the defaults out is an assumption; no tensor depends on it.
    "flux1-kontext-dev": _FLUX1 | {"axes_dims_rope": [16, 56, 56], "out_channels": 64},
    # That it has FLUX.1 [dev]'s keys is an assumption: its card calls it a drop-in replacement.
    "flux1-krea-dev": _FLUX1,
    # As copies of Fill and of Canny have them; Depth's pipeline takes the same inputs as Canny's.
    "flux1-fill-dev": _FLUX1 | {"axes_dims_rope": [16, 56, 56], "in_channels": 384, "out_channels": 64},
    "flux1-canny-dev": _FLUX1 | {"axes_dims_rope": [16, 56, 56], "in_channels": 128, "out_channels": 64},
    "flux1-depth-dev": _FLUX1 | {"axes_dims_rope": [16, 56, 56], "in_channels": 128, "out_channels": 64},
    # As a copy of the repo has it.
    "chroma": _FLUX1
    | {
        "_class_name": "ChromaTransformer2DModel",
        "approximator_hidden_dim": 5120,
        "approximator_layers": 5,
        "approximator_num_channels": 64,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "out_channels": None,
    },
    # As diffusers' scripts/convert_flux2_to_diffusers.py writes it; the published file has no guidance_embeds.
    "flux2-dev": _FLUX2,
    # As a copy of the 4B base has them; 9B's sizes are those of the same script and of Black Forest Labs' own code.
    "flux2-klein-4b": _KLEIN_4B,
    "flux2-klein-base-4b": _KLEIN_4B,
    "flux2-klein-9b": _KLEIN_9B,
    "flux2-klein-base-9b": _KLEIN_9B,
    # diffusers' defaults, which are Wan 2.1's 14B too; SGLang's configs/models/dits/wanvideo.py has the same.
    "wan2.2-t2v-a14b": _WAN,
    # Wan's own configs (wan_ti2v_5B.py): dim 3072, ffn 14336, 24 heads, 30 blocks, 48 channels.
    "wan2.2-ti2v-5b": _WAN
    | {"ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24, "num_layers": 30, "out_channels": 48},
    # As diffusers' scripts/convert_wan_to_diffusers.py writes them; all keys are spelled out, as in T2V's.
    "wan2.2-i2v-a14b": _WAN | {"in_channels": 36},
    "wan2.1-t2v-14b": _WAN,
    "wan2.1-t2v-1.3b": _WAN | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
    "wan2.1-i2v-14b": _WAN | {"added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36},
    "z-image": _Z_IMAGE | {"siglip_feat_dim": None},
    "z-image-turbo": _Z_IMAGE,
    "qwen-image": _QWEN | {"pooled_projection_dim": 768},
    # That 2512 has Qwen-Image-Edit's keys is an assumption: SGLang and others load both with the same values.
    "qwen-image-2512": _QWEN,
    "qwen-image-edit": _QWEN,
    "qwen-image-edit-2511": _QWEN | {"zero_cond_t": True},
    # As a copy of the repo has it.
    "qwen-image-layered": _QWEN | {"use_additional_t_cond": True, "use_layer3d_rope": True, "zero_cond_t": False},
    # As copies of Medium and Large have them; Turbo is Large, distilled.
    "sd3.5-medium": _SD35 | {"dual_attention_layers": list(range(13))},
    "sd3.5-large": _SD35_LARGE,
    "sd3.5-large-turbo": _SD35_LARGE,
    "krea2-raw": _KREA2,
    "krea2-turbo": _KREA2,
    "hunyuanvideo": {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 16,
        "mlp_ratio": 4.0,
        "num_attention_heads": 24,
        "num_layers": 20,
        "num_refiner_layers": 2,
        "num_single_layers": 40,
        "out_channels": 16,
        "patch_size": 2,
        "patch_size_t": 1,
        "pooled_projection_dim": 768,
        "qk_norm": "rms_norm",
        "rope_axes_dim": [16, 56, 56],
        "rope_theta": 256.0,
        "text_embed_dim": 4096,
    },
    "ltx2": _LTX2,
    "ltx-2.3": _LTX23,
    "ltx-2.5": _LTX23 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True},
    "ltx-video-2b": _LTX_VIDEO,
    "ltx-video-13b": _LTX_VIDEO | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    "cosmos-predict1-t2w": _COSMOS_1,
    "cosmos-predict1-v2w": _COSMOS_1 | {"in_channels": 17},
    "cosmos-predict2-t2i": _COSMOS,
    "cosmos-predict2-v2w": _COSMOS | {"in_channels": 17, "rope_scale": [1.0, 3.0, 3.0]},
    "cosmos-predict2.5": _COSMOS_25,
    "cosmos-transfer2.5": _COSMOS_25
    | {
        "controlnet_block_every_n": 7,
        "img_context_dim_in": 1152,
        "img_context_dim_out": 2048,
        "img_context_num_tokens": 256,
    },
    "hunyuanvideo-1.5-t2v": _HUNYUANVIDEO_15 | {"task_type": "t2v"},
    "hunyuanvideo-1.5-i2v": _HUNYUANVIDEO_15 | {"task_type": "i2v"},
}
# What of each is published in F32, and not in BF16: all of Wan's, whose files have four bytes a parameter, and Krea 2's
# norms and modulations, as the card of a copy says.
_F32 = {"wan": r".*", "krea2": r".*(norm.?|norm_[qk]|scale_shift_table)(\.weight)?$"}


def model_of(preset: str) -> Any:
    """A preset's model as diffusers' class makes it, on the meta device."""
    import diffusers
    import torch

    config = dict(CONFIGS[preset])
    name = config.pop("_class_name")
    if name == "QwenImageTransformer2DModel":
        config.pop("pooled_projection_dim", None)  # diffusers ignores it now, with a warning
    if name == "ChromaTransformer2DModel":
        config = {
            key: value for key, value in config.items() if key not in ("guidance_embeds", "pooled_projection_dim")
        }
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def tensors_of(preset: str) -> dict[str, tuple[str, list[int]]]:
    """Every tensor of a preset's model, as diffusers' class has it."""
    model = model_of(preset)
    in_f32 = next((pattern for start, pattern in _F32.items() if preset.startswith(start)), r"(?!)")
    return {
        name: ("F32" if re.match(in_f32, name) else "BF16", list(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def compress(tensors: Tensors) -> dict[str, tuple[str, list[int]]]:
    """One entry for what is alike in blocks 0 to n of a list, in the order in which entries first occur."""
    alike: dict[str, list[str]] = {}
    for name, (dtype, shape) in tensors.items():
        alike.setdefault(f"{re.sub(r'[.]([0-9]+)[.]', '.*.', name, count=1)} {dtype} {shape}", []).append(name)
    found: dict[str, tuple[str, list[int]]] = {}
    for names in alike.values():
        numbers = [int(match[1]) for name in names if (match := re.search(r"[.]([0-9]+)[.]", name))]
        if len(names) > 1 and numbers == list(range(len(names))):
            found[re.sub(r"[.]0[.]", f".{{0-{len(names) - 1}}}.", names[0], count=1)] = tensors[names[0]]
        else:
            found |= {name: tensors[name] for name in names}
    return found


def expand(tensors: Mapping[str, Iterable[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that compressed entries stand for."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in tensors.items():
        head, brace, rest = name.partition("{0-")
        last, _, tail = rest.partition("}")
        names = [f"{head}{number}{tail}" for number in range(int(last) + 1)] if brace else [name]
        found |= dict.fromkeys(names, (dtype, tuple(shape)))
    return found


def render(preset: str) -> str:
    """The text of a preset's file, one tensor a line."""
    entries = compress(tensors_of(preset)).items()
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries)
    return f'{{\n "config": {json.dumps(CONFIGS[preset])},\n "tensors": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for name in CONFIGS:
        (TARGET / f"{name}.json").write_text(render(name), encoding="utf-8")
