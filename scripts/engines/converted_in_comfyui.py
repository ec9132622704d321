"""Load what mopt wrote ``--to comfyui`` with ComfyUI, on a CPU, and compare it with what it was made from.

    MOPT_COMFYUI=CHECKOUT python converted_in_comfyui.py OUT ...

No code and no table of mopt's is used: ComfyUI's layouts decode what it holds packed, to float32, and diffusers'
converters bring its names back to those of the export and the base.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import comparison
import load_comfyui
import torch
from comparison import Tensors, stored

_WIDTH = 3072  # of FLUX.1 and HunyuanVideo, which diffusers' converters take for granted
_CONVERTERS = {
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "WanTransformer3DModel": "convert_wan_transformer_to_diffusers",
    "LTX2VideoTransformer3DModel": "convert_ltx2_transformer_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "HunyuanVideoTransformer3DModel": "convert_hunyuan_video_transformer_to_diffusers",
}
# What ComfyUI calls otherwise than the file that the converter was written for.
_SPELLED: dict[str, tuple[tuple[str, str], ...]] = {
    "FluxTransformer2DModel": (("_norm.weight", "_norm.scale"),),
    "Flux2Transformer2DModel": (("_norm.weight", "_norm.scale"),),
    "HunyuanVideoTransformer3DModel": (
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
        ("txt_in.t_embedder.in_layer.", "txt_in.t_embedder.mlp.0."),
        ("txt_in.t_embedder.out_layer.", "txt_in.t_embedder.mlp.2."),
        ("txt_in.c_embedder.in_layer.", "txt_in.c_embedder.linear_1."),
        ("txt_in.c_embedder.out_layer.", "txt_in.c_embedder.linear_2."),
        ("_mod.lin.", "_mod.linear."),
        (".modulation.lin.", ".modulation.linear."),
        ("_attn.qkv.", "_attn_qkv."),
        ("_attn.proj.", "_attn_proj."),
        ("_attn.norm.query_norm.weight", "_attn_q_norm.weight"),
        ("_attn.norm.key_norm.weight", "_attn_k_norm.weight"),
        (".norm.query_norm.weight", ".q_norm.weight"),
        (".norm.key_norm.weight", ".k_norm.weight"),
        ("time_in.in_layer.", "time_in.mlp.0."),
        ("time_in.out_layer.", "time_in.mlp.2."),
        ("guidance_in.in_layer.", "guidance_in.mlp.0."),
        ("guidance_in.out_layer.", "guidance_in.mlp.2."),
    ),
}


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What ComfyUI holds and what it should hold, by diffusers' names."""
    [file] = checkpoint.glob("*.safetensors")
    config = json.loads((checkpoint / comparison.BASE / "config.json").read_text())
    parameters = load_comfyui.held(file.name, checkpoint, config, {})
    lies = {name: one.dtype for name, one in stored(checkpoint)}
    packed = _marked(parameters, {name for name, one in parameters.items() if hasattr(one, "layout_cls")}, config)
    narrow = _marked(parameters, {name for name in parameters if lies.get(name) == torch.bfloat16}, config)
    held = _named({name: _wide(one) for name, one in parameters.items()}, config)
    return comparison.told_apart(held, packed, narrow, checkpoint)


def _marked(parameters: Tensors, marked: set[str], config: dict[str, Any]) -> set[str]:
    """The same parameters by diffusers' names."""
    marks = {name: torch.full(one.shape, float(name in marked)) for name, one in parameters.items()}
    return {name for name, one in _named(marks, config).items() if one.any()}


def _wide(held: torch.Tensor) -> torch.Tensor:
    """In float32, as ComfyUI's own layout decodes it if it is packed."""
    if not hasattr(held, "layout_cls"):
        return held.float()
    return held.layout_cls.dequantize(held._qdata, replace(held._params, orig_dtype=torch.float32))[: held.shape[0]]


def _named(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """By diffusers' names."""
    kind = config["_class_name"]
    spelled = {}
    for name, one in tensors.items():
        for new, old in _SPELLED.get(kind, ()):
            name = name.replace(new, old)
        spelled[name] = one
    if kind not in _CONVERTERS:
        return spelled
    from diffusers.loaders import single_file_utils  # when torchvision can be imported

    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    converter = getattr(single_file_utils, _CONVERTERS[kind])
    return FunctionType(_resized(converter.__code__, width), converter.__globals__)(spelled)


def _resized(code: CodeType, width: int) -> CodeType:
    """The same code for a small model."""
    constants = [
        _resized(one, width) if isinstance(one, CodeType) else width if one == _WIDTH else one for one in code.co_consts
    ]
    return code.replace(co_consts=tuple(constants))


if __name__ == "__main__":
    comparison.main(load_comfyui.start, load)
