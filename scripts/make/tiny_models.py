"""The families of make_export.py: small transformers of diffusers, and how ModelOpt's diffusers example treats each.

A new family needs one function that makes the inputs of a forward pass, and one entry of FAMILIES. What to mind:

- Every Linear that is quantized has a number of input features divisible by 16, the block size of NVFP4.
- Every Linear that is quantized runs in the forward pass; one that does not gets no input_scale in the export.
- Recipes that leave the outer blocks alone by index are adapted to the depth here, so that inner blocks are quantized.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


class Draw:
    """Makes the tensors of a calibration run, all in one dtype, the random ones always the same."""

    def __init__(self, dtype: "torch.dtype") -> None:
        """Start over, with a seed of its own."""
        import torch

        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(7)

    def random(self, *shape: int) -> "torch.Tensor":
        """Normally distributed numbers."""
        import torch

        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def full(self, value: float, *shape: int) -> "torch.Tensor":
        """The same number everywhere."""
        import torch

        return torch.full(shape, value, dtype=self.dtype)


@dataclass(frozen=True)
class Family:
    """A class of transformers, a small config of it, and a ModelOpt recipe."""

    class_name: str  # in diffusers
    config: Config
    inputs: Callable[[Config, Draw], dict[str, Any]]  # the arguments of a forward pass, given the model's whole config
    left_alone: str  # what the recipe does not quantize: a regular expression for the start of a parameter's name
    attention: bool = False  # whether the recipe calibrates FP8 attention, which leaves its amax in the export
    base_dtype: str = "bfloat16"  # of the base on disk
    gain: float = 1 / 3  # of the weights; a third keeps activations about as large as they come, within float16

    def leaves_alone(self, name: str) -> bool:
        """Whether the recipe leaves a parameter or quantizer in the precision that it has."""
        return "bmm" in name or re.match(self.left_alone, name) is not None


def _flux1_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 16, config["in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["joint_attention_dim"]),
        "pooled_projections": draw.random(1, config["pooled_projection_dim"]),
        "timestep": draw.full(0.5, 1),
        "img_ids": draw.full(0, 16, 3),
        "txt_ids": draw.full(0, 8, 3),
        "guidance": draw.full(3.5, 1),
    }


def _chroma_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    inputs = _flux1_inputs(config | {"pooled_projection_dim": 1}, draw)
    return {name: value for name, value in inputs.items() if name not in ("pooled_projections", "guidance")}


def _flux2_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 16, config["in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["joint_attention_dim"]),
        "timestep": draw.full(0.5, 1),
        "img_ids": draw.full(0, 16, 4),
        "txt_ids": draw.full(0, 8, 4),
        "guidance": draw.full(3.5, 1) if config["guidance_embeds"] else None,
    }


def _wan_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, config["in_channels"], 2, 8, 8),
        "timestep": draw.full(500, 1),
        "encoder_hidden_states": draw.random(1, 8, config["text_dim"]),
    }


def _wan_image_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    # diffusers takes all but the last 512 tokens for the image's.
    return _wan_inputs(config, draw) | {
        "encoder_hidden_states": draw.random(1, 512, config["text_dim"]),
        "encoder_hidden_states_image": draw.random(1, 257, config["image_dim"]),
    }


def _qwen_image_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 16, config["in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": draw.full(1, 1, 8),
        "timestep": draw.full(0.5, 1),
        "img_shapes": [[(1, 4, 4)]],
    }


def _sd3_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, config["in_channels"], 8, 8),
        "encoder_hidden_states": draw.random(1, 8, config["joint_attention_dim"]),
        "pooled_projections": draw.random(1, config["pooled_projection_dim"]),
        "timestep": draw.full(500, 1),
    }


def _krea2_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 16, config["in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["num_text_layers"], config["text_hidden_dim"]),
        "timestep": draw.full(0.5, 1),
        "position_ids": draw.full(0, 24, 3),
    }


def _hunyuan_video_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, config["in_channels"], 2, 8, 8),
        "timestep": draw.full(500, 1),
        "encoder_hidden_states": draw.random(1, 8, config["text_embed_dim"]),
        "encoder_attention_mask": draw.full(1, 1, 8),
        "pooled_projections": draw.random(1, config["pooled_projection_dim"]),
        "guidance": draw.full(6000, 1),
    }


def _hunyuan_video_15_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, config["in_channels"], 2, 4, 4),
        "timestep": draw.full(500, 1),
        "encoder_hidden_states": draw.random(1, 8, config["text_embed_dim"]),
        "encoder_attention_mask": draw.full(1, 1, 8),
        "encoder_hidden_states_2": draw.random(1, 8, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": draw.full(1, 1, 8),
        "image_embeds": draw.random(1, 8, config["image_embed_dim"]),
    }


def _cosmos_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, config["in_channels"], 2, 8, 8),
        "timestep": draw.full(0.5, 1),
        "encoder_hidden_states": draw.random(1, 8, config["crossattn_proj_in_channels"]),
    }


def _ltx_video_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 2 * 2 * 4, config["in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["caption_channels"]),
        "timestep": draw.full(500, 1),
        "encoder_attention_mask": draw.full(1, 1, 8),
        "num_frames": 2,
        "height": 2,
        "width": 4,
    }


def _ltx2_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.random(1, 2 * 2 * 4, config["in_channels"]),
        "audio_hidden_states": draw.random(1, 8, config["audio_in_channels"]),
        "encoder_hidden_states": draw.random(1, 8, config["caption_channels"]),
        "audio_encoder_hidden_states": draw.random(1, 8, config["caption_channels"]),
        "timestep": draw.full(500, 1),
        "encoder_attention_mask": draw.full(1, 1, 8),
        "audio_encoder_attention_mask": draw.full(1, 1, 8),
        "num_frames": 2,
        "height": 2,
        "width": 4,
        "audio_num_frames": 8,
    }


def _ltx2_3_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    # The prompt comes projected, and is modulated by the noise level.
    return _ltx2_inputs(config, draw) | {
        "encoder_hidden_states": draw.random(1, 8, config["cross_attention_dim"]),
        "audio_encoder_hidden_states": draw.random(1, 8, config["audio_cross_attention_dim"]),
        "sigma": draw.full(500, 1),
    }


def _z_image_inputs(config: Config, draw: Draw) -> dict[str, Any]:
    return {
        "x": [draw.random(config["in_channels"], 1, 8, 8)],
        "t": draw.full(0.5, 1),
        "cap_feats": [draw.random(8, config["cap_feat_dim"])],
    }


_FLUX_LEFT_ALONE = (
    r"proj_out|.*(time_text_embed|context_embedder|x_embedder|norm_out|time_guidance_embed|stream_modulation)"
)
_FLUX2 = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 64,
    "axes_dims_rope": (8, 8, 8, 8),
}
_WAN_LEFT_ALONE = r".*(patch_embedding|condition_embedder|proj_out|blocks\.(0|1|2|5|6|7)\.)"
_WAN = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 288,
    "num_layers": 8,
    "rope_max_seq_len": 64,
}
# ModelOpt's default, for models of which its example has no filter.
_LEFT_ALONE = r".*(time_text_embed|context_embedder|norm_out|x_embedder)"
_LTX2 = {
    "in_channels": 64,
    "out_channels": 64,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "cross_attention_dim": 96,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_num_attention_heads": 3,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 48,
    "num_layers": 9,
    "caption_channels": 64,
    "rope_type": "split",
}
_LTX2_LEFT_ALONE = r".*(proj_in|time_embed|caption_projection|proj_out|transformer_blocks\.(0|1|2|6|7|8)\.)"

FAMILIES = {
    "flux1": Family(
        class_name="FluxTransformer2DModel",
        config={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 5,
            "joint_attention_dim": 96,
            "pooled_projection_dim": 48,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        },
        inputs=_flux1_inputs,
        left_alone=_FLUX_LEFT_ALONE,
        attention=True,
        gain=1,
    ),
    # FLUX.1's recipe, and without what makes the modulation of all blocks.
    "chroma": Family(
        class_name="ChromaTransformer2DModel",
        config={
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 5,
            "joint_attention_dim": 96,
            "axes_dims_rope": (8, 12, 12),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 48,
            "approximator_layers": 2,
        },
        inputs=_chroma_inputs,
        left_alone=rf"distilled_guidance_layer|{_FLUX_LEFT_ALONE}",
    ),
    "flux2": Family(
        class_name="Flux2Transformer2DModel",
        config=_FLUX2,
        inputs=_flux2_inputs,
        left_alone=_FLUX_LEFT_ALONE,
        attention=True,
    ),
    # FLUX.2 [klein] 4B has five blocks, by which its preset knows it, and no guidance.
    "flux2_klein": Family(
        class_name="Flux2Transformer2DModel",
        config=_FLUX2 | {"num_layers": 5, "num_single_layers": 1, "num_attention_heads": 2, "guidance_embeds": False},
        inputs=_flux2_inputs,
        left_alone=_FLUX_LEFT_ALONE,
        attention=True,
    ),
    # The bases on the Hub are F32, and diffusers keeps some of it (_keep_in_fp32_modules) whatever dtype it loads in.
    "wan": Family(
        class_name="WanTransformer3DModel",
        config=_WAN,
        inputs=_wan_inputs,
        left_alone=_WAN_LEFT_ALONE,
        base_dtype="float32",
    ),
    # The recipe is for 40 blocks; the 5B model has fewer, so that its last ones are quantized.
    "wan_5b": Family(
        class_name="WanTransformer3DModel",
        config={
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "text_dim": 64,
            "freq_dim": 64,
            "ffn_dim": 192,
            "num_layers": 7,
            "rope_max_seq_len": 64,
        },
        inputs=_wan_inputs,
        left_alone=r".*(patch_embedding|condition_embedder|proj_out|blocks\.(0|1|2|37|38|39)\.)",
        base_dtype="float32",
    ),
    # Image-to-video: beside the latents, the image's and a mask lie in the channels.
    "wan_i2v": Family(
        class_name="WanTransformer3DModel",
        config=_WAN | {"in_channels": 36},
        inputs=_wan_inputs,
        left_alone=_WAN_LEFT_ALONE,
        base_dtype="float32",
    ),
    # As in Wan 2.1, with a cross-attention to the image as well. ModelOpt's dummy forward pass takes as many tokens of
    # text as rope_max_seq_len allows, up to 512.
    "wan_i2v_image": Family(
        class_name="WanTransformer3DModel",
        config=_WAN | {"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 96, "rope_max_seq_len": 1024},
        inputs=_wan_image_inputs,
        left_alone=_WAN_LEFT_ALONE,
        base_dtype="float32",
    ),
    "qwen_image": Family(
        class_name="QwenImageTransformer2DModel",
        config={
            "in_channels": 64,
            "num_layers": 8,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": 64,
            "axes_dims_rope": (8, 12, 12),
        },
        inputs=_qwen_image_inputs,
        left_alone=r"(?!transformer_blocks\.(2|3|4|5)\.)",
    ),
    # Stable Diffusion 3.5 Medium has that many positions, by which its preset knows it, and a second attention in its
    # first blocks.
    "sd3": Family(
        class_name="SD3Transformer2DModel",
        config={
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 384,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        inputs=_sd3_inputs,
        left_alone=r".*(pos_embed|time_text_embed|context_embedder|norm_out)",
    ),
    # ModelOpt's examples have none: what SGLang can load packed. It takes the feed-forwards' width from the model's.
    "krea2": Family(
        class_name="Krea2Transformer2DModel",
        config={
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 64,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 256,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (8, 12, 12),
        },
        inputs=_krea2_inputs,
        left_alone=r"img_in|time_embed|time_mod_proj|txt_in|text_fusion\.projector|final_layer",
    ),
    "hunyuan_video": Family(
        class_name="HunyuanVideoTransformer3DModel",
        config={
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 64,
            "pooled_projection_dim": 48,
            "rope_axes_dim": (8, 12, 12),
        },
        inputs=_hunyuan_video_inputs,
        left_alone=r".*(time_text_embed|context_embedder|norm_out|x_embedder)",
    ),
    # ModelOpt would pack the table of condition types as well.
    "hunyuan_video_15": Family(
        class_name="HunyuanVideo15Transformer3DModel",
        config={
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 64,
            "text_embed_2_dim": 48,
            "image_embed_dim": 32,
            "rope_axes_dim": (8, 12, 12),
            "task_type": "t2v",
        },
        inputs=_hunyuan_video_15_inputs,
        left_alone=f"{_LEFT_ALONE}|cond_type_embed",
    ),
    # As Cosmos-Predict2.5, but for the padding mask, for which diffusers needs torchvision. Of a patch 68 features come
    # in, which blocks of 16 do not fit.
    "cosmos": Family(
        class_name="CosmosTransformer3DModel",
        config={
            "in_channels": 17,
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "num_layers": 2,
            "text_embed_dim": 64,
            "adaln_lora_dim": 16,
            "max_size": (8, 16, 16),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 128,
            "encoder_hidden_states_channels": 64,
        },
        inputs=_cosmos_inputs,
        left_alone=f"{_LEFT_ALONE}|patch_embed",
    ),
    # The recipe is for 48 blocks; LTX-Video 2B has fewer, so that its last ones are quantized.
    "ltx_video": Family(
        class_name="LTXVideoTransformer3DModel",
        config={
            "in_channels": 64,
            "out_channels": 64,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "num_layers": 7,
            "caption_channels": 64,
        },
        inputs=_ltx_video_inputs,
        left_alone=r".*(proj_in|time_embed|caption_projection|proj_out|transformer_blocks\.(0|1|2|45|46|47)\.)",
    ),
    "ltx2": Family(
        class_name="LTX2VideoTransformer3DModel",
        config=_LTX2,
        inputs=_ltx2_inputs,
        left_alone=_LTX2_LEFT_ALONE,
    ),
    "ltx2_3": Family(
        class_name="LTX2VideoTransformer3DModel",
        config=_LTX2
        | {
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "perturbed_attn": True,
            "use_prompt_embeddings": False,
        },
        inputs=_ltx2_3_inputs,
        left_alone=_LTX2_LEFT_ALONE,
    ),
    # The filter of NVIDIA/Model-Optimizer#1205: refiners are quantized but for their norms.
    "z_image": Family(
        class_name="ZImageTransformer2DModel",
        config={
            "in_channels": 16,
            "dim": 384,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 64,
        },
        inputs=_z_image_inputs,
        left_alone=r".*(x_embedder|t_embedder|cap_embedder|adaLN_modulation|final_layer)",
    ),
}
