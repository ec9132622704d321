"""What an engine takes a checkpoint for, and where that is not what it is. Pure, no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from modelopt_convert.formats.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """What the engine will take the checkpoint for. Modules are named as on disk.

    Attributes:
        engine: Name and version.
        quantized: Whether the engine will load the checkpoint as quantized at all; SGLang's of NVFP4, as NVFP4.
        layout: How the engine reads codes and scales.
        group_size: Columns per scale.
        modules: Modules that the engine takes for packed.
        input_scales: ``stored``: the checkpoint's; where one is missing, ``dynamic``: the inputs at hand give it; or,
            whatever is declared, ``ones``: it is 1.0, or ``unset``: it is what lay in memory.
        because: What each belief rests on.
        refuses: Why the engine will not load the checkpoint at all, or None.
        fused: Packed modules that the engine holds as one, of which the largest global scale counts for all.
        unset: Packed modules whose scales the engine drops.
        decodes: Whether a packed weight is decoded where the engine expects a plain one; else it does not load.
    """

    engine: str
    quantized: bool
    layout: Layout
    group_size: int | None
    modules: frozenset[str]
    input_scales: Literal["stored", "dynamic", "ones", "unset"]
    because: tuple[str, ...]
    refuses: str | None
    fused: tuple[tuple[str, ...], ...] = ()
    unset: frozenset[str] = frozenset()
    decodes: bool = False


TAKEN_FOR_PLAIN = "packed, taken for unquantized"
TAKEN_FOR_PACKED = "in BF16, taken for packed"
UNSET = "scales dropped"


def differences(belief: Belief, packed: Collection[str], linears: Collection[str]) -> dict[str, frozenset[str]]:
    """Modules that are taken for something else than they are, by what for; nothing empty.

    Args:
        belief: What the engine takes the checkpoint for.
        packed: Modules that are packed.
        linears: All Linears.
    """
    found = {
        TAKEN_FOR_PLAIN: frozenset(packed) - belief.modules,
        TAKEN_FOR_PACKED: (belief.modules & frozenset(linears)) - frozenset(packed),
        UNSET: belief.unset & frozenset(packed),
    }
    return {what: names for what, names in found.items() if names}


def mistaken(belief: Belief, packed: Collection[str], linears: Collection[str]) -> list[str]:
    """Which modules are taken for something else than they are, in words; arguments as those of ``differences``."""
    if belief.refuses:
        return [belief.refuses]
    words = {
        TAKEN_FOR_PLAIN: "decode {} to BF16" if belief.decodes else "take {} for unquantized",
        TAKEN_FOR_PACKED: "take {} in BF16 for packed",
        UNSET: "drop the scales of {}",
    }
    found: list[str] = []
    for what, names in differences(belief, packed, linears).items():
        kind = "modules" if what == TAKEN_FOR_PACKED else "packed modules"
        count = words[what].replace("{}", f"{len(names)} {kind}")
        found.append(f"{belief.engine} would {count} ({min(names)} first)")
    return found
