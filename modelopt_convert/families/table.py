"""Which family a checkpoint is of, by its names and shapes, and what of a whole one is not the transformer. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.families.family import Family, Spelling
from modelopt_convert.families.flux1 import CHROMA, FLUX1
from modelopt_convert.families.flux2 import FLUX2
from modelopt_convert.families.hunyuan_video import HUNYUAN_VIDEO
from modelopt_convert.families.ltx2 import LTX2
from modelopt_convert.families.qwen_image import QWEN_IMAGE
from modelopt_convert.families.sd3 import SD3
from modelopt_convert.families.wan import WAN
from modelopt_convert.families.z_image import Z_IMAGE

FAMILIES = (FLUX1, FLUX2, CHROMA, WAN, QWEN_IMAGE, LTX2, Z_IMAGE, HUNYUAN_VIDEO, SD3)
COMFYUI_PREFIX = "model.diffusion_model."
# What checkpoints put in front of the transformer's names.
PREFIXES = ("", COMFYUI_PREFIX, "velocity_model.", "diffusion_model.", "transformer.")
# Starts of whole names, whatever the transformer's prefix is.
LEFT_OUT: Mapping[str, str] = {
    "vae.": "the VAE",
    "first_stage_model.": "the VAE",
    "audio_vae.": "the VAE of sound",
    "vocoder.": "the vocoder",
    "text_encoder.": "a text encoder",
    "text_encoders.": "a text encoder",
    "cond_stage_model.": "a text encoder",
    "conditioner.": "a text encoder",
    "text_embedding_projection.": "the projection of a text encoder",
}


class Found(NamedTuple):
    """The family of a checkpoint.

    Attributes:
        family: Its table; where a row is another in the last block, with the number of blocks.
        spelling: Whose names the checkpoint has.
        prefix: What stands in front of each of the transformer's names.
        evidence: Why, for people.
    """

    family: Family
    spelling: Spelling
    prefix: str
    evidence: list[str]


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Found | None:
    """The family of a checkpoint, quantized or not.

    Args:
        shapes: Every tensor's name and shape, as they are in the file.

    Returns:
        The family; None if no family's marks are all there, or if two transformers lie in one checkpoint.
    """
    found = candidates(shapes)
    return found[0] if len(found) == 1 else None


def candidates(shapes: Mapping[str, tuple[int, ...]]) -> list[Found]:
    """Every family and prefix whose marks are all there: of a checkpoint of two transformers both."""
    return [one for prefix in PREFIXES for one in _under(prefix, shapes)]


def left_out(name: str, found: Found) -> str | None:
    """What a tensor is that lies beside the transformer; None for one of the transformer, and for an unknown one."""
    if name.startswith(found.prefix):
        bare = name.removeprefix(found.prefix)
        for start, what in found.family.beside.items():
            if bare.startswith(start):
                return what
    return next((what for start, what in LEFT_OUT.items() if name.startswith(start)), None)


def beside(names: Iterable[str], found: Found | None) -> dict[str, str]:
    """The fate of each tensor that lies beside the transformer, by name; nothing if the family is unknown."""
    if found is None:
        return {}
    return {name: f"left out: {what}" for name in names if (what := left_out(name, found)) is not None}


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Found]:
    names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
    modules = {module_of(name) for name in names}
    for family in FAMILIES:
        fitting = [spelling for spelling in family.spellings if modules.issuperset(_marks(family, spelling))]
        if fitting:
            spelling = _spelling(family, fitting, names, prefix)
            evidence = [*_evidence(family, spelling, names, prefix), *_sizes(family, spelling, shapes, modules, prefix)]
            yield Found(_with_blocks(family, spelling, modules), spelling, prefix, evidence)


def _marks(family: Family, spelling: Spelling) -> list[str]:
    places = (family.native(mark, spelling) for mark in family.marks)
    return [place[0] for place in places if place is not None]


def _spelling(family: Family, fitting: Sequence[Spelling], names: Sequence[str], prefix: str) -> Spelling:
    """Where names are the same in two spellings: the one that other signs are of."""
    if len(fitting) == 1:
        return fitting[0]
    signs_of_comfyui = prefix == COMFYUI_PREFIX or any(name.endswith(".comfy_quant") for name in names)
    if "diffusers" in fitting:
        return "comfyui" if signs_of_comfyui else "diffusers"
    if family.original_norm == "scale":
        return "original" if any(name.endswith("_norm.scale") for name in names) else "comfyui"
    return "comfyui" if signs_of_comfyui else "original"


def _evidence(family: Family, spelling: Spelling, names: Sequence[str], prefix: str) -> list[str]:
    whose = {"diffusers": "diffusers'", "comfyui": "ComfyUI's", "original": "the model's own"}[spelling]
    marks = ", ".join(repr(mark) for mark in _marks(family, spelling))
    if spelling == "diffusers":
        known = sum(family.native_tensor(name, spelling) is not None for name in names)
    else:
        known = sum(family.tensor(name) is not None for name in names)
    where = f"under {prefix!r} " if prefix else ""
    return [
        f"modules of {family.title} in {whose} names: {marks}",
        f"{known} of {len(names)} tensors {where}have its names",
    ]


def _sizes(
    family: Family,
    spelling: Spelling,
    shapes: Mapping[str, tuple[int, ...]],
    modules: set[str],
    prefix: str,
) -> list[str]:
    first = f"{prefix}{_marks(family, spelling)[0]}.weight"
    shown = [f"{first!r} is {list(shapes[first])}"] if first in shapes else []
    blocks = [f"{count} in {stack!r}" for stack, count in sorted(_stacks(family, spelling, modules).items())]
    return [*shown, f"blocks: {', '.join(blocks)}"]


def _stacks(family: Family, spelling: Spelling, modules: set[str]) -> dict[str, int]:
    """How many blocks each stack has, by the highest number."""
    found: dict[str, int] = {}
    for module in modules:
        if counted := family.count(module, spelling):
            stack, number = counted
            found[stack] = max(found.get(stack, 0), int(number) + 1)
    return found


def _with_blocks(family: Family, spelling: Spelling, modules: set[str]) -> Family:
    return replace(family, blocks=max(_stacks(family, spelling, modules).values())) if family.needs_blocks else family
