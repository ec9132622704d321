"""What one engine makes of one file, whatever its dialect, and the weights that are at stake. Pure, no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.formats.layout import Layout

Outcome = Literal["reads", "misreads", "refuses", "unknown"]
Shown = Literal["run", "read", "inferred"]

UNSCALED = "codes taken for weights, scales dropped"
HALVED = "codes taken for weights of half as many columns"
NVFP4_DTYPES = ("U8",)
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# What holds codes in dialects that do not call them `.weight`.
_OTHER_CODES = ("_weight_qdata", ".weight_packed", ".qweight", "_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an engine makes of a file, and what that rests on.

    Attributes:
        engine: Name and version.
        outcome: ``reads``: it takes every quantized module for one, by ``layout`` where there are layouts.
        how: What it does, in words that go on after "it".
        source: The engine's file that says so.
        shown: Whether the engine's code was run, was read, or the fact follows from what was read.
        layout: How it reads codes and scales of NVFP4; None where it reads none.
        modules: Modules that it takes for something else than they are, by what for.
        depends: What the reading depends on beside the file, or what of it was not judged; empty if nothing.
        notes: What a user should know besides.
    """

    engine: str
    outcome: Outcome
    how: str
    source: str
    shown: Shown
    layout: Layout | None = None
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    depends: str = ""
    notes: tuple[str, ...] = ()


def coded(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Weights [N, K] or [N, K/2] that are stored as codes, by module."""
    return {
        name.removesuffix(".weight"): one
        for name, one in tensors.items()
        if name.endswith(".weight") and len(one.shape) == 2 and one.dtype in (*NVFP4_DTYPES, *FP8_DTYPES, "I8")
    }


def has_other_codes(tensors: Collection[str]) -> bool:
    """Whether there are quantized weights under other names than ``.weight``."""
    return any(name.endswith(_OTHER_CODES) for name in tensors)


def quant_keys(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a config.json, if it is an object."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else None


def is_quantized(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether there is anything that an engine could take for something else than it is."""
    return bool(coded(tensors)) or has_other_codes(tensors)


def counted(names: Collection[str], kind: str = "module") -> str:
    """A number of modules with the first one's name, in words."""
    return f"{len(names)} {kind}{'s' * (len(names) > 1)} ({min(names)} first)"
