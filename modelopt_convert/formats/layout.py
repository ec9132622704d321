"""How the bytes of a packed NVFP4 weight lie, and how that is known. Pure, no torch.

The detector, the plan, the writer, verify, inspect, the engines' views and config.json all use this one value.
ModelOpt's own layout is ``CANONICAL``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NibbleOrder = Literal["low", "high", "equivalent", "undetermined"]
ScaleOrder = Literal["linear", "128x4", "equivalent", "undetermined"]
GlobalScale = Literal["multiply", "divide", "undetermined"]
Basis = Literal["none", "hint", "shape", "declared", "proven"]

BASES: tuple[Basis, ...] = ("none", "hint", "shape", "declared", "proven")
"""From weak to strong."""
_NIBBLES_KEY = "swap_weight_nibbles"
_SCALES_KEY = "checkpoint_weight_scale_layout"
# What is written for an answer.
_NIBBLES: Mapping[NibbleOrder, bool] = {"low": False, "high": True}
_SCALES: Mapping[ScaleOrder, str] = {"linear": "linear", "128x4": "swizzled"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The answers to three questions; two layouts are equal if the answers are, however they are known.

    Attributes:
        nibbles: Which nibble holds the even column; ``equivalent``: both readings decode alike.
        scales: In which order the block scales lie; ``equivalent``: both readings decode alike.
        global_scale: Whether ``weight_scale_2`` multiplies, or divides as a reciprocal.
        nibbles_by: How the first answer is known.
        scales_by: How the second answer is known.
    """

    nibbles: NibbleOrder = "low"
    scales: ScaleOrder = "linear"
    global_scale: GlobalScale = "multiply"
    nibbles_by: Basis = field(default="none", compare=False)
    scales_by: Basis = field(default="none", compare=False)

    @property
    def basis(self) -> Basis:
        """How both orders are known: the weaker of the two."""
        return min(self.nibbles_by, self.scales_by, key=BASES.index)

    @property
    def is_clear(self) -> bool:
        """Whether every question has an answer."""
        return "undetermined" not in (self.nibbles, self.scales, self.global_scale)

    def over(self, other: "Layout") -> "Layout":
        """These answers, and the answers of ``other`` to questions that are undetermined here."""
        found = self
        if self.nibbles == "undetermined":
            found = replace(found, nibbles=other.nibbles, nibbles_by=other.nibbles_by)
        if self.scales == "undetermined":
            found = replace(found, scales=other.scales, scales_by=other.scales_by)
        return found if self.global_scale != "undetermined" else replace(found, global_scale=other.global_scale)

    def in_words(self) -> str:
        """How the layout departs from what ModelOpt writes; empty if it does not."""
        parts = [
            "the high nibble holds the even column (nibbles swapped)" if self.nibbles == "high" else "",
            "the scales lie in the 128x4 order (swizzled)" if self.scales == "128x4" else "",
            "the global scale is a reciprocal" if self.global_scale == "divide" else "",
        ]
        return " and ".join(part for part in parts if part)

    def config_keys(self) -> dict[str, Any]:
        """The keys of ``quantization_config`` that declare the layout; none for what is undetermined."""
        keys = {_NIBBLES_KEY: _NIBBLES.get(self.nibbles), _SCALES_KEY: _SCALES.get(self.scales)}
        return {key: value for key, value in keys.items() if value is not None}


UNDETERMINED = Layout("undetermined", "undetermined", "undetermined")
CANONICAL = Layout()


def declared_layout(keys: Mapping[str, Any]) -> Layout:
    """What the keys of a ``quantization_config`` declare; where no key says anything, the answer is undetermined."""
    found, swapped = UNDETERMINED, keys.get(_NIBBLES_KEY)
    if isinstance(swapped, bool):
        found = replace(found, nibbles="high" if swapped else "low", nibbles_by="declared")
    scales = next((order for order, word in _SCALES.items() if word == keys.get(_SCALES_KEY)), None)
    return found if scales is None else replace(found, scales=scales, scales_by="declared")
