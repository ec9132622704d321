"""Inputs of a transformer that runs without its pipeline: captured ones from a file, or random ones."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_convert.run.errors import InputError, first_line

_TEXT_TOKENS = 64


def captured(path: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Inputs from a safetensors file: ``ARGUMENT`` of the one call, or ``N.ARGUMENT`` of call N from 0.

    Args:
        path: The file.
        dtype: What BF16, F16 and F32 of two and more dimensions are brought to.

    Raises:
        InputError: ``fidelity.inputs``.
    """
    from safetensors.torch import load_file

    if path.is_dir():
        raise _refused(path, "expected a safetensors file, found a folder")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own kinds, and the system's
        raise _refused(path, f"expected a safetensors file, found {first_line(error)}") from None
    calls: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, argument = name.rpartition(".")
        if number and not number.isdecimal():
            raise _refused(path, f"tensor {name!r}: expected ARGUMENT or NUMBER.ARGUMENT")
        call = calls.setdefault(int(number or 0), {})
        if argument in call:
            raise _refused(
                path, f"tensor {name!r}: expected {argument} of call {int(number or 0)} once, found it twice"
            )
        wide = value.is_floating_point() and value.ndim > 1
        call[argument] = value.to(dtype) if wide else value
    if sorted(calls) != [*range(len(calls))] or not calls:
        raise _refused(path, f"expected calls from 0 on, found {sorted(calls)[:5]}")
    return [calls[number] for number in range(len(calls))]


def distinct(calls: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Calls without those that are equal to one before them: of a run that is repeated nothing more is known."""
    found: dict[str, dict[str, Tensor]] = {}
    for call in calls:
        digest = hashlib.sha256()
        for name in sorted(call):
            value = call[name].contiguous()
            digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        found.setdefault(digest.hexdigest(), call)
    return [*found.values()]


def random_inputs(model: nn.Module, count: int, size: int) -> list[dict[str, Any]]:
    """Seeded inputs of FLUX.1, normal and so unlike those of pictures.

    Args:
        model: diffusers' transformer.
        count: How many.
        size: Height and width of the picture in pixels, of which a token has 16 x 16.

    Raises:
        InputError: ``fidelity.inputs``: it is another model.
    """
    if type(model).__name__ != "FluxTransformer2DModel":
        raise InputError(
            f"random inputs are made for FluxTransformer2DModel alone, found {type(model).__name__}",
            code="fidelity.inputs",
            hint="give --pipeline with --prompts, or --inputs with captured tensors",
        )
    config: Any = model.config
    side, dtype = max(1, size // 16), torch.bfloat16
    places = torch.stack(torch.meshgrid(torch.zeros(1), *(torch.arange(side).float(),) * 2, indexing="ij"), -1)
    made = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        made.append(
            {
                "hidden_states": torch.randn(1, side * side, config.in_channels, generator=draw).to(dtype),
                "encoder_hidden_states": torch.randn(1, _TEXT_TOKENS, config.joint_attention_dim, generator=draw).to(
                    dtype
                ),
                "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw).to(dtype),
                "timestep": torch.full((1,), 1.0 - seed / count).to(dtype),
                "img_ids": places.view(-1, 3),
                "txt_ids": torch.zeros(_TEXT_TOKENS, 3),
                "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
            }
        )
    return made


def _refused(path: Path, words: str) -> InputError:
    return InputError(
        f"{path}: {words}",
        code="fidelity.inputs",
        path=str(path),
        hint="save what the transformer's forward() got with safetensors, by the names of its arguments",
    )
