"""What an engine holds after loading, compared with what the checkpoint says. Shared by the loaders; needs torch alone.

The checkpoint is decoded here in the canonical layout, by the definition of NVFP4 and FP8. mopt has proven it against
the base; so an engine is right if it holds these values.
"""

import json
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_ROUNDING = 1e-6
EXPORT, BASE = "export", "base"  # folders in a conversion, of the transformers that it was made from
LOSS = 0.25  # a packed module that is off by more is not held with a loss, it is another


def main(start: Callable[[], None], load: Callable[[Path], tuple[Tensors, Tensors]]) -> None:
    """Load the checkpoints that the command line names; a line of JSON for each."""
    start()
    for argument in sys.argv[1:]:
        try:
            found = compare(*load(Path(argument)), packed_modules(Path(argument)))
        except Exception as error:
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(lines[:2])[:200] or f"{where.line} in {Path(where.filename).name}"
            found = {"outcome": "fails", "why": f"{type(error).__name__}: {said}"}
        print(json.dumps({"checkpoint": argument, **found}), flush=True)


def compare(held: Tensors, wanted: Tensors, packed: int) -> dict[str, Any]:
    """An outcome and its figures, of what is held and of what is wanted, by the engine's names.

    Returns:
        ``outcome``: ``right`` if all is held to the last bits of float32; ``loss`` if packed weights are a little off;
        ``wrong`` otherwise. ``off``: how many are. ``first``: the worst. ``figure``: its relative error, None if it is
        absent or was never set. ``differ``: all that are off. ``takes``: the modules that it holds packed.
    """
    errors = {name: _error(held.get(name), value) for name, value in wanted.items()}
    # What is decoded here is float32. All else is to be held as it lies.
    off = {
        name: error
        for name, error in errors.items()
        if not error <= (_ROUNDING if wanted[name].dtype == torch.float32 else 0)
    }
    wrong = [name for name, error in off.items() if not error <= LOSS or wanted[name].dtype != torch.float32]
    worst = max(wrong or off, key=lambda name: math.inf if math.isnan(off[name]) else off[name], default=None)
    # What is held packed was decoded, to float32.
    takes = [name for name, one in held.items() if one.ndim == 2 and one.dtype == torch.float32]
    return {
        "outcome": "wrong" if wrong else "loss" if off else "right",
        "compared": len(wanted),
        "packed": packed,
        "off": len(off),
        "first": worst,
        "figure": None if worst is None or math.isnan(off[worst]) else round(off[worst], 4),
        "differ": by_block(off),
        "takes": by_block(name.removesuffix(".weight") for name in takes if name.endswith(".weight")),
    }


def by_block(names: Iterable[str]) -> list[str]:
    """Names in order, those that differ in their first number alone as one: ``blocks.{0-2,4}.to_q``."""
    alike: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<=[.])[0-9]+(?=[.])", name)
        numbers = alike.setdefault(name if found is None else f"{name[: found.start()]}*{name[found.end() :]}", [])
        numbers += [] if found is None else [int(found[0])]
    return sorted(name.replace("*", f"{{{_spans(numbers)}}}") for name, numbers in alike.items())


def _spans(numbers: Iterable[int]) -> str:
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, one)) for one in found)


def _error(held: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Relative error; NaN for what is absent, of another shape or never set."""
    if held is None or held.shape != wanted.shape:
        return math.nan
    return float((held.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-9))


def stored(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint, as they lie in its files."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def decoded(checkpoint: Path) -> Tensors:
    """The weights that a checkpoint means: packed ones in float32, all others as they lie."""
    tensors = dict(stored(checkpoint))
    found: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.uint8:
            found[name] = decode_nvfp4(tensor, tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"])
        elif tensor.dtype == torch.float8_e4m3fn and f"{module}.weight" == name:
            found[name] = tensor.float() * tensors[f"{module}.weight_scale"].float()
        elif not name.endswith(("_scale", "_scale_2")):
            found[name] = tensor
    return found


def told_apart(
    held: Tensors, quantized: Collection[str], narrow: Collection[str], checkpoint: Path
) -> tuple[Tensors, Tensors]:
    """What is held of a conversion and what should be, by diffusers' names.

    Quantized weights are to be those of the export, all others the base's, in float64: there no rounding is let pass.

    Args:
        held: Every parameter; what is held packed is decoded to float32.
        quantized: Which of them are quantized, or were and are in BF16 now.
        narrow: Those that the conversion has in BF16, to which the base is rounded once.
        checkpoint: The conversion, with what it was made from in its folders ``EXPORT`` and ``BASE``.
    """
    meant, wanted = decoded(checkpoint / EXPORT), decoded(checkpoint / BASE)
    for name, one in wanted.items():
        kept = (one.bfloat16() if name in narrow else one).double()
        wanted[name] = meant[name].to(held[name].dtype) if name in quantized else kept
    return {name: one if name in quantized else one.double() for name, one in held.items()}, wanted


def packed_modules(checkpoint: Path) -> int:
    """How many modules of a checkpoint are packed."""
    return sum(name.endswith("weight_scale") for name, _ in stored(checkpoint))


def decode_nvfp4(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of codes [N, K/2], the low nibble first, scales [N, K/16] and a factor, one or [N, 1].

    The product of the scales is rounded first, as ModelOpt, comfy-kitchen and torchao do.
    """
    values = torch.stack((_E2M1[(codes & 15).long()], _E2M1[(codes >> 4).long()]), -1).flatten(-2)
    return values * (scale.float() * scale_2.float()).repeat_interleave(16, -1)[:, : values.shape[1]]


def by_rows(factors: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """[N, 1]: the factor of each row, of a factor for each part of a fused weight."""
    factors = factors.flatten().float()
    if factors.numel() == 1:
        return factors.reshape(1, 1)
    return torch.cat([factor.expand(width) for factor, width in zip(factors, widths, strict=True)])[:, None]


def alone() -> None:
    """The surroundings of a process group of one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def let_torchvision_import() -> None:
    """Its CUDA build beside a CPU torch: the one fake kernel that it registers unconditionally needs the schema."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []  # a library lives as long as its object
