"""A diffusers pipeline that runs transformers which were loaded here, one prompt and seed at a time."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelopt_convert.run.errors import InputError, first_line

Offload = Literal["none", "model", "sequential"]
INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        steps: Of the scheduler.
        size: Height and width in pixels.
        frames: Of a video; pipelines of images take none.
    """

    steps: int
    size: int
    frames: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one run gave.

    Attributes:
        latents: After each step, on the CPU, in float32; shapes are the pipeline's own.
        frames: float32 [F, H, W, 3] in 0..1; of an image, F is 1.
    """

    latents: tuple[Tensor, ...]
    frames: Tensor


def load_pipeline(reference: str, transformers: Mapping[str, nn.Module], *, device: str, offload: Offload) -> Any:
    """A diffusers pipeline whose transformers are these; all else is the reference's.

    Args:
        reference: A folder with model_index.json, or a repo on the Hub as diffusers names it.
        transformers: By the name of the component: ``transformer`` or ``transformer_2``.
        device: Where it runs, as torch names it.
        offload: What leaves the device between calls: nothing, whole components, or layers.

    Raises:
        InputError: ``pipeline.missing``, ``pipeline.other_model`` or ``pipeline.load``.
    """
    import diffusers

    index = _index(reference)
    for name, transformer in transformers.items():
        wanted = (index.get(name) or (None, None))[1] if index is not None else type(transformer).__name__
        if wanted != type(transformer).__name__:
            raise InputError(
                f"{reference}: {name}: expected {type(transformer).__name__} as in the base, found {wanted}",
                code="pipeline.other_model",
                path=reference,
                hint="give the pipeline that the base is the transformer of",
            )
    kind: Any = diffusers.DiffusionPipeline  # its functions have no types
    try:
        pipeline = kind.from_pretrained(reference, torch_dtype=torch.bfloat16, **transformers)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{reference}: diffusers cannot load this pipeline: {first_line(error)}",
            code="pipeline.load",
            path=reference,
            hint="give a folder or repo that DiffusionPipeline.from_pretrained loads",
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def _index(reference: str) -> dict[str, Any] | None:
    """``model_index.json`` of a folder; None where the reference is a repo, which diffusers fetches."""
    if not Path(reference).exists():
        return None
    path = Path(reference) / INDEX
    if not path.is_file():
        raise InputError(
            f"{reference}: expected a pipeline with {INDEX}, found none",
            code="pipeline.missing",
            path=reference,
            hint="give the whole pipeline: transformer, text encoders and VAE, as diffusers saves it",
        )
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else {}


def pipeline_identity(reference: str) -> dict[str, str]:
    """What identifies a pipeline wherever it lies: of a folder the digest of its index, of a repo its name.

    Raises:
        InputError: ``pipeline.missing``.
    """
    if _index(reference) is None:
        return {"repo": reference}
    return {"model_index_sha256": hashlib.sha256((Path(reference) / INDEX).read_bytes()).hexdigest()}


def draw(pipeline: Any, prompt: str, seed: int, how: Drawing) -> Drawn:
    """Run a pipeline once.

    Args:
        pipeline: As ``load_pipeline`` gives it.
        prompt: What to draw.
        seed: Of the noise, which is drawn on the CPU, so that every machine starts alike.
        how: Steps and size.

    Raises:
        InputError: ``pipeline.run``.
    """
    latents: list[Tensor] = []
    found = run_once(pipeline, prompt, seed, how, lambda _, latent: latents.append(latent.to("cpu", torch.float32)))
    shown = found.images if hasattr(found, "images") else found.frames
    return Drawn(tuple(latents), frames_of(shown))


def run_once(
    pipeline: Any,
    prompt: str,
    seed: int,
    how: Drawing,
    after_step: Callable[[int, Tensor], None],
    *,
    output: Literal["pt", "latent"] = "pt",
) -> Any:
    """Run a pipeline, and give what it gives.

    Args:
        pipeline: As ``load_pipeline`` gives it.
        prompt: What to draw.
        seed: See ``draw``.
        how: Steps and size.
        after_step: Told the number of each step, from 0, and its latents.
        output: Whether latents are decoded.

    Raises:
        InputError: ``pipeline.run``.
    """

    def told(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(step, tensors["latents"].detach())
        return tensors

    takes = inspect.signature(pipeline.__call__).parameters
    asked: dict[str, Any] = {"height": how.size, "width": how.size, "num_frames": how.frames}
    asked["max_sequence_length"] = longest_text(pipeline, takes)
    try:
        with torch.inference_mode():
            return pipeline(
                prompt=prompt,
                num_inference_steps=how.steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type=output,
                callback_on_step_end=told,
                **{name: value for name, value in asked.items() if name in takes and value is not None},
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"the pipeline fails on prompt {prompt[:60]!r}: {first_line(error)}",
            code="pipeline.run",
            hint="check --size, --frames and the pipeline itself",
        ) from error


def longest_text(pipeline: Any, takes: Mapping[str, inspect.Parameter]) -> int | None:
    """Tokens of a prompt that a pipeline pads to: its own number, or its T5's if that takes fewer."""
    if "max_sequence_length" not in takes:
        return None
    own = takes["max_sequence_length"].default
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer_2", "tokenizer_3", "tokenizer")]
    last = next((one for one in tokenizers if one is not None), None)
    limit = getattr(last, "model_max_length", own)
    return min(own, limit) if isinstance(own, int) else None


def frames_of(shown: Any) -> Tensor:
    """Frames float32 [F, H, W, 3] of a pipeline's ``output_type="pt"``: [1, C, H, W] or [1, F, C, H, W]."""
    found = torch.as_tensor(shown[0] if isinstance(shown, list) else shown).detach().to("cpu", torch.float32)
    found = found.flatten(0, -4) if found.ndim > 3 else found[None]
    return found.movedim(-3, -1).clamp(0, 1)
