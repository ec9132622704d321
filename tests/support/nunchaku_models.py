"""Whole checkpoints of nunchaku's engine, made of small models of diffusers' classes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nunchaku_files import Kind, Made, halves, w4a4, w4a16
from safetensors.torch import save_file
from support import Tensors

_HEADS = {"attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 96, "axes_dims_rope": [16, 24, 24]}
# diffusers' class, the engine's, and the config.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux1": (
        "FluxTransformer2DModel",
        "NunchakuFluxTransformer2dModel",
        {**_HEADS, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 48, "in_channels": 16,
         "guidance_embeds": True},
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        "NunchakuQwenImageTransformer2DModel",
        {**_HEADS, "num_layers": 1, "in_channels": 16, "out_channels": 4},
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        "NunchakuZImageTransformer2DModel",
        {"n_layers": 1, "n_refiner_layers": 1, "dim": 384, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
         "in_channels": 4},
    ),
}  # fmt: skip


def small(family: str) -> Any:
    """The smallest model of a class with whole tiles of 128; a gain for each matrix, and rows of several sizes."""
    import diffusers

    torch.manual_seed(7)
    name, _, config = CONFIGS[family]
    model = getattr(diffusers, name)(**config).bfloat16().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 2:
                parameter.mul_(1 + parameter.shape[0] % 3).mul_(torch.rand(parameter.shape[0], 1) + 0.5)
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A whole model, packed.

    Attributes:
        tensors: As the engine has them.
        meant: What it computes with, by diffusers' names, float64.
    """

    tensors: Tensors
    meant: Mapping[str, torch.Tensor]


# By the engine's names within a block: diffusers' members, and what is particular.
_FLUX_DOUBLE: dict[str, tuple[str, ...]] = {
    "norm1.linear": ("norm1.linear",),
    "norm1_context.linear": ("norm1_context.linear",),
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}
_FLUX_SINGLE: dict[str, tuple[str, ...]] = {
    "norm.linear": ("norm.linear",),
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "mlp_fc1": ("proj_mlp",),
    "out_proj": ("proj_out",),
    "mlp_fc2": ("proj_out",),
}
_QWEN: dict[str, tuple[str, ...]] = {
    "img_mod.1": ("img_mod.1",),
    "txt_mod.1": ("txt_mod.1",),
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": ("attn.to_out.0",),
    "attn.to_add_out": ("attn.to_add_out",),
    "img_mlp.net.0.proj": ("img_mlp.net.0.proj",),
    "img_mlp.net.2": ("img_mlp.net.2",),
    "txt_mlp.net.0.proj": ("txt_mlp.net.0.proj",),
    "txt_mlp.net.2": ("txt_mlp.net.2",),
}
_Z: dict[str, tuple[str, ...]] = {
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_out.0": ("attention.to_out.0",),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.net.2": ("feed_forward.w2",),
}
BLOCKS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "flux1": {"transformer_blocks.": _FLUX_DOUBLE, "single_transformer_blocks.": _FLUX_SINGLE},
    "qwen_image": {"transformer_blocks.": _QWEN},
    "z_image": {"layers.": _Z, "noise_refiner.": _Z, "context_refiner.": _Z},
}
_PARTS = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3, "img_mod.1": 6, "txt_mod.1": 6}
_SHIFTED = ("mlp_fc2", "mlp_context_fc2", "img_mlp.net.2", "txt_mlp.net.2")
_OUT = ("out_proj", "out_proj_context", "attn.to_out.0", "attn.to_add_out")
_NEW_ROLES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
_OLD_NAMES = {f"attn.{name}": name for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}


def packed(family: str, state: Tensors, kind: Kind, *, fused: bool = True) -> Checkpoint:
    """A model as the engine has it.

    Args:
        family: ``flux1``, ``qwen_image`` or ``z_image``.
        state: diffusers' state dict.
        kind: INT4 or NVFP4.
        fused: Whether the smoothing of an attention's output is in v, as deepcompressor makes it.
    """
    tensors: Tensors = {}
    meant = {name: one.double() for name, one in state.items()}
    left = dict(state)
    blocks = sorted(
        {(stack, name.split(".")[1]) for name in state for stack in BLOCKS[family] if name.startswith(stack)}
    )
    for stack, number in blocks:
        block = f"{stack}{number}"
        smooth = _smooth(f"{block} out", state[f"{block}.{_values(family, stack)}.weight"].shape[0])
        for name, members in BLOCKS[family][stack].items():
            full = [f"{block}.{one}" for one in members]
            weight = torch.cat([state[f"{one}.weight"] for one in full]).double()
            has_bias = f"{full[0]}.bias" in state
            bias = torch.cat([state[f"{one}.bias"] for one in full]).double() if has_bias else None
            if name in _PARTS:
                assert bias is not None
                one = w4a16(weight, bias, _PARTS[name])
            else:
                if members == ("proj_out",):
                    width = smooth.numel()
                    weight = weight[:, :width] if name == "out_proj" else weight[:, width:]
                    bias = torch.zeros_like(bias) if name == "out_proj" and bias is not None else bias
                is_fused = fused and name in _OUT
                if fused and members[-1] in ("attn.to_v", "attn.add_v_proj"):
                    third = weight.shape[0] // 3
                    weight[2 * third :] /= smooth.double()[:, None]
                    if bias is not None:
                        bias[2 * third :] /= smooth.double()
                factor = smooth if name in _OUT else _smooth(f"{block} {name}", weight.shape[1])
                one = w4a4(weight, bias, kind, factor, shifted=name in _SHIFTED, fused=is_fused)
            words = {} if family == "flux1" else _NEW_ROLES
            tensors |= {f"{block}.{name}.{words.get(role, role)}": tensor for role, tensor in one.tensors.items()}
            _mean(meant, full, one, name)
            for member in full:
                left.pop(f"{member}.weight", None)
                left.pop(f"{member}.bias", None)
    for name, tensor in left.items():
        tensors[_old(name) if family == "flux1" else name] = tensor
    return Checkpoint(tensors, meant)


def _mean(meant: dict[str, torch.Tensor], full: list[str], one: Made, name: str) -> None:
    each = one.weight.shape[0] // len(full)
    for which, member in enumerate(full):
        rows = slice(which * each, (which + 1) * each)
        if name == "mlp_fc2" and member.endswith("proj_out"):
            meant[f"{member}.weight"] = torch.cat((meant[f"{member}.weight"], one.weight), 1)
            meant[f"{member}.bias"] = meant[f"{member}.bias"] + one.bias
            continue
        meant[f"{member}.weight"] = one.weight[rows]
        if one.bias is not None:
            meant[f"{member}.bias"] = one.bias[rows]


def _values(family: str, stack: str) -> str:
    return "attention.to_v" if family == "z_image" else "attn.to_v"


def _smooth(name: str, columns: int) -> torch.Tensor:
    return halves((columns,), sum(name.encode()), 0.5, 2.0)


def _old(name: str) -> str:
    for new, old in _OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.") if name.split(".")[0].endswith("transformer_blocks") else name
    return name


def header(config: Mapping[str, Any], kind: Kind, model_class: str) -> dict[str, str]:
    """What ``nunchaku/merge_safetensors.py`` writes into the header."""
    said = {"method": "svdquant", "rank": 16, "weight": {"dtype": "int4" if kind == "int4" else "fp4_e2m1_all"}}
    return {
        "config": json.dumps(config),
        "comfy_config": "{}",
        "model_class": model_class,
        "quantization_config": json.dumps(said),
    }


def merged(made: Checkpoint, path: Path, config: Mapping[str, Any], kind: Kind, model_class: str) -> Path:
    """One file."""
    path.mkdir(parents=True)
    save_file(made.tensors, path / "nunchaku.safetensors", header(config, kind, model_class))
    return path / "nunchaku.safetensors"


def two_files(made: Checkpoint, path: Path, config: Mapping[str, Any]) -> Path:
    """The folder of before: blocks in one file, the rest in another, and a config.json."""
    path.mkdir(parents=True)
    blocks = {name: one for name, one in made.tensors.items() if "transformer_blocks." in name}
    rest = {name: one for name, one in made.tensors.items() if name not in blocks}
    save_file(blocks, path / "transformer_blocks.safetensors")
    save_file(rest, path / "unquantized_layers.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    (path / "comfy_config.json").write_text("{}")
    return path
