"""What the two formats differ in, beside their tensors: names, declarations, limits. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Algorithm = Literal["nvfp4", "fp8"]


@dataclass(frozen=True, slots=True)
class Format:
    """A quantization format that mopt writes.

    Attributes:
        algorithm: As presets and commands name it.
        quant_algo: As config.json does.
        packed_dtype: Of a quantized weight.
        words: What it is, for the model card.
        declared: Keys of ``quantization_config`` that say how the tensors are to be read.
    """

    algorithm: Algorithm
    quant_algo: str
    packed_dtype: str
    words: str
    declared: Mapping[str, Any]


NVFP4 = Format(
    algorithm="nvfp4",
    quant_algo="NVFP4",
    packed_dtype="U8",
    words="W4A4, blocks of 16",
    declared={
        "quant_type": "NVFP4",
        "group_size": 16,
        "swap_weight_nibbles": False,
        "checkpoint_weight_scale_layout": "linear",
    },
)
FP8 = Format(
    algorithm="fp8",
    quant_algo="FP8",
    packed_dtype="F8_E4M3",
    words="W8A8, E4M3 with one scale per tensor",
    declared={"quant_type": "FP8"},
)
FORMATS: Mapping[Algorithm, Format] = {"nvfp4": NVFP4, "fp8": FP8}
