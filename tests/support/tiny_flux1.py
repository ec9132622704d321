"""The trained pipeline of tests/data, and a run of it in which other code than mopt's computes quantized layers.

Weights are unpacked by compressed-tensors, activations are cast by ml_dtypes, products are float64: nothing of
``modelopt_convert`` takes part.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from root import ROOT
from support import load

FOLDER = ROOT / "tests" / "data" / "tiny_flux1"
_E4M3, _E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
Array = np.ndarray[Any, Any]


def nvfp4_activations(values: Array, input_scale: Array) -> Array:
    """float32 [M, K]: E2M1 codes times block scales, as flashinfer's quantizer makes them for ``1 / input_scale``."""
    blocks = values.astype(np.float32).reshape(len(values), -1, 16)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    one = np.float32(1)
    factor = one / input_scale
    scale = np.minimum(factor * (largest * (one / np.float32(6))), np.float32(448)).astype(_E4M3).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(largest == 0, np.float32(0), one / (scale * (one / factor)))
        scaled = np.nan_to_num(blocks * inverse, nan=0.0, posinf=6.0, neginf=-6.0)
    codes = np.clip(scaled, -6, 6).astype(_E2M1).astype(np.float32)
    return (codes * scale).reshape(values.shape)


def fp8_activations(values: Array, input_scale: Array) -> Array:
    """float32 [M, K]: E4M3 codes."""
    scaled = values.astype(np.float32) * (np.float32(1) / input_scale)
    return np.clip(scaled, -448, 448).astype(_E4M3).astype(np.float32)


def input_scale_of(values: Array, bits: int, stored: torch.Tensor | None) -> Array:
    """The scale that is stored, or the one that SGLang takes from the values."""
    if stored is not None:
        return np.float32(stored.item())
    if bits == 4:
        return np.maximum(np.abs(values).max().astype(np.float32), np.float32(1e-8)) / np.float32(2688)
    return np.maximum(np.abs(values).max(axis=-1, keepdims=True).astype(np.float32), np.float32(1e-10)) / np.float32(
        448
    )


def independent_layer(tensors: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a packed module returns for BF16 activations."""
    roles = ("weight", "weight_scale", "weight_scale_2", "input_scale", "bias")
    weight, scale, scale_2, input_scale, bias = (tensors.get(f"{name}.{role}") for role in roles)
    assert weight is not None and scale is not None
    if weight.dtype == torch.uint8:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        assert scale_2 is not None
        bits, factor = 4, np.float32(scale_2.item())
        codes = unpack_fp4_from_uint8(weight, weight.shape[0], weight.shape[1] * 2, dtype=torch.float64)
        decoded = (codes.view(len(codes), -1, 16) * scale.double()[..., None]).flatten(1).numpy()
    else:
        bits, factor, decoded = 8, np.float32(scale.item()), weight.double().numpy()

    def layer(values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1]).float().numpy()
        mine = input_scale_of(rows, bits, input_scale)
        made = (nvfp4_activations if bits == 4 else fp8_activations)(rows, mine)
        output = (made.astype(np.float64) @ decoded.T).astype(np.float32) * (mine * factor)
        rounded = output.astype(ml_dtypes.bfloat16)
        if bias is not None:
            rounded = (rounded.astype(np.float32) + bias.float().numpy()).astype(ml_dtypes.bfloat16)
        return torch.from_numpy(rounded.astype(np.float32)).bfloat16().view(*values.shape[:-1], -1)

    return layer


def independent_pipeline(checkpoint: Path | None) -> Any:
    """diffusers' own pipeline; its packed layers replaced, and all other tensors the checkpoint's."""
    from diffusers import FluxPipeline

    pipeline: Any = FluxPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if checkpoint is not None:
        tensors = load(checkpoint)
        packed = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
        for name, module in pipeline.transformer.named_modules():
            if name in packed:
                module.forward = independent_layer(tensors, name)
        rest = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in packed}
        missing, unexpected = pipeline.transformer.load_state_dict(rest, strict=False)
        assert not unexpected and {name.rpartition(".")[0] for name in missing} == packed
    return pipeline


def drawn(pipeline: Any, prompt: str, seed: int, steps: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Latents after each step, and the picture [32, 32, 3] in 0..1."""
    latents: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(tensors["latents"].double())
        return tensors

    image = pipeline(
        prompt,
        height=32,
        width=32,
        num_inference_steps=steps,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    return latents, torch.tensor(image).double()


def inputs_of(transformer: Path, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the transformer's forward() takes, small and seeded."""
    config = json.loads((transformer / "config.json").read_text())
    draw = torch.Generator().manual_seed(5)
    made = {
        "hidden_states": torch.randn(1, 4, config["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(1, 6, config["joint_attention_dim"], generator=draw),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    return made | ({"guidance": torch.tensor([3.5])} if config.get("guidance_embeds") else {}) | changed
