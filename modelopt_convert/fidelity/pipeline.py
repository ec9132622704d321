"""A diffusers pipeline that runs transformers which were loaded here, one prompt and seed at a time."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from modelopt_convert.checkpoint.calibration import file_digest
from modelopt_convert.checkpoint.companions import MODEL_INDEX
from modelopt_convert.checkpoint.config import MAX_CONFIG_BYTES
from modelopt_convert.checkpoint.location import read_small
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.run.errors import InconclusiveError, InputError, MoptError, StorageError, first_line

Offload = Literal["none", "model", "sequential"]


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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a pipeline lies.

    Attributes:
        folder: That has ``model_index.json``; of a repo, the snapshot in the Hub's cache.
        commit: Of a repo.
        index: What ``model_index.json`` says.
        kind: diffusers' class.
    """

    folder: Path
    commit: str | None
    index: Mapping[str, Any]
    kind: Any

    def component(self, name: str) -> str | None:
        """The class of a component."""
        found = self.index.get(name)
        return found[1] if isinstance(found, list) and len(found) == 2 else None


def load_pipeline(reference: str, transformers: Mapping[str, nn.Module], *, device: str, offload: Offload) -> Any:
    """A diffusers pipeline whose transformers are these; all else is the reference's.

    Args:
        reference: A folder with model_index.json, or a repo on the Hub as diffusers names it.
        transformers: By the name of the component: ``transformer`` or ``transformer_2``.
        device: Where it runs, as torch names it.
        offload: What leaves the device between calls: nothing, whole components, or layers.

    Raises:
        InputError: ``pipeline.other_model``, ``pipeline.load``, or what ``pipeline_identity`` raises.
        InconclusiveError: ``device.none``: there is no GPU for ``offload``.
        StorageError: ``device.memory``.
    """
    if offload != "none" and torch.device(device).type == "cpu":
        raise InconclusiveError(
            f"--offload {offload}: torch sees no GPU",
            code="device.none",
            hint="leave --offload out, or run on a machine with a GPU",
        )
    place = _place(reference)
    for name, transformer in transformers.items():
        wanted = place.component(name)
        if wanted != type(transformer).__name__:
            raise InputError(
                f"{reference}: {name}: expected {type(transformer).__name__} as in the base, found {wanted}",
                code="pipeline.other_model",
                path=reference,
                hint="give the pipeline that the base is the transformer of",
            )
    try:
        with _no_bars():
            pipeline = place.kind.from_pretrained(
                reference, torch_dtype=torch.bfloat16, revision=place.commit, **transformers
            )
    except (MemoryError, MoptError):
        raise
    except Exception as error:  # of files that other libraries read: they have no kind of error in common
        raise InputError(
            f"{reference}: diffusers cannot load this pipeline: {first_line(error)}",
            code="pipeline.load",
            path=reference,
            hint="give a folder or repo that DiffusionPipeline.from_pretrained loads",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    with gpu_memory():
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
    return pipeline


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without progress bars of libraries, which know nothing of mopt's."""
    import diffusers.utils.logging
    import transformers.utils.logging

    shown = [one for one in (diffusers.utils.logging, transformers.utils.logging) if one.is_progress_bar_enabled()]
    try:
        for one in shown:
            one.disable_progress_bar()
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()


@contextmanager
def gpu_memory(*, is_alone: bool = False) -> Iterator[None]:
    """Tell of a GPU whose memory runs out.

    Args:
        is_alone: Whether the transformer runs without a pipeline, which could offload it.

    Raises:
        StorageError: ``device.memory``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        card = "the GPU"
        if torch.cuda.is_available():
            card = f"{torch.cuda.get_device_name()} of {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB"
        raise StorageError(
            f"the memory of {card} ran out: {first_line(error)}",
            code="device.memory",
            hint="give --device cpu, or --pipeline and --prompts with --offload sequential"
            if is_alone
            else "give --offload sequential, or a smaller --size",
        ) from error


def _place(reference: str) -> _Place:
    """Find a pipeline, and read its index.

    Raises:
        InputError: ``pipeline.missing``, ``pipeline.load``, ``pipeline.index``, or what ``parse_json_object`` raises.
    """
    import diffusers

    folder, commit = Path(reference), None
    if not folder.exists():
        folder, commit = _snapshot(reference)
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise InputError(
            f"{reference}: expected a pipeline with {MODEL_INDEX}, found none",
            code="pipeline.missing",
            path=reference,
            hint="give the whole pipeline: transformer, text encoders and VAE, as diffusers saves it",
        )
    index = parse_json_object(
        read_small(path, MAX_CONFIG_BYTES, code="pipeline"), code="pipeline", path=f"{reference}/{MODEL_INDEX}"
    )
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise InputError(
            f"{reference}/{MODEL_INDEX}: _class_name: expected a pipeline of diffusers {diffusers.__version__}, found "
            f"{ascii(name)[:80]}",
            code="pipeline.index",
            path=reference,
            hint="give a pipeline without code of its own, or install a diffusers that has the class",
        )
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        found = index.get(key)
        if key != "self" and parameter.default is parameter.empty and not (isinstance(found, list) and len(found) == 2):
            raise InputError(
                f"{reference}/{MODEL_INDEX}: {key}: expected [library, class] for {name}, found {ascii(found)[:80]}",
                code="pipeline.index",
                path=reference,
                hint="download the pipeline again",
            )
    return _Place(folder, commit, index, kind)


@functools.cache  # so that a repo which changes meanwhile is one pipeline to a run
def _snapshot(repo: str) -> tuple[Path, str]:
    """The folder in the Hub's cache and the commit of a repo.

    Raises:
        InputError: ``pipeline.load``.
    """
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(repo, MODEL_INDEX)).parent
    except Exception as error:  # the Hub's own kinds, the network's, and those of names
        raise InputError(
            f"{repo}: no such folder, and the Hub gives no {MODEL_INDEX} of a repo of this name: {first_line(error)}",
            code="pipeline.load",
            path=repo,
            hint="give a folder that exists, or a repo that you may read, as ORGANIZATION/NAME",
        ) from error
    return folder, folder.name


def pipeline_identity(reference: str, ours: Collection[str]) -> dict[str, str]:
    """What identifies a pipeline wherever it lies: of a folder digests of its files, of a repo its commit.

    Args:
        reference: As ``load_pipeline`` has it.
        ours: Components that are loaded from elsewhere.

    Raises:
        InputError: It has no usable index.
    """
    place = _place(reference)
    if place.commit is not None:
        return {"repo": reference, "commit": place.commit}
    digest = xxhash.xxh3_128()
    for name in sorted(place.index):
        if name in ours or not place.component(name):
            continue
        for path in sorted(one for one in (place.folder / name).rglob("*") if one.is_file()):
            said = (path.relative_to(place.folder).as_posix(), path.stat().st_size, file_digest(path))
            digest.update(repr(said).encode())
    index = (place.folder / MODEL_INDEX).read_bytes()
    return {"model_index_sha256": hashlib.sha256(index).hexdigest(), "files_xxh3_128": digest.hexdigest()}


def takes_frames(reference: str) -> bool:
    """Whether a pipeline draws videos.

    Raises:
        InputError: It has no usable index.
    """
    return "num_frames" in inspect.signature(_place(reference).kind.__call__).parameters


def draw(pipeline: Any, prompt: str, seed: int, how: Drawing) -> Drawn:
    """Run a pipeline once.

    Args:
        pipeline: As ``load_pipeline`` gives it.
        prompt: What to draw.
        seed: Of the noise, which is drawn on the CPU, so that every machine starts alike.
        how: Steps and size.

    Raises:
        InputError: ``pipeline.run`` or ``pipeline.size``.
        StorageError: ``device.memory``.
    """
    latents: list[Tensor] = []
    found = run_once(pipeline, prompt, seed, how, lambda _, latent: latents.append(latent.to("cpu", torch.float32)))
    frames = frames_of(found.images if hasattr(found, "images") else found.frames)
    height, width = frames.shape[1:3]
    if (height, width) != (how.size, how.size):
        raise InputError(
            f"--size {how.size}: expected pictures of {how.size} x {how.size}, the pipeline draws {width} x {height}",
            code="pipeline.size",
            hint=f"give --size {min(height, width)}",
        )
    return Drawn(tuple(latents), frames)


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
        StorageError: ``device.memory``.
    """

    def told(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(step, tensors["latents"].detach())
        return tensors

    takes = inspect.signature(pipeline.__call__).parameters
    asked: dict[str, Any] = {"height": how.size, "width": how.size, "num_frames": how.frames}
    asked["max_sequence_length"] = longest_text(pipeline)
    try:
        with torch.inference_mode(), gpu_memory():
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


def longest_text(pipeline: Any) -> int | None:
    """Tokens of a prompt that a pipeline pads to: its own number, or its T5's if that takes fewer."""
    takes = inspect.signature(pipeline.__call__).parameters
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
