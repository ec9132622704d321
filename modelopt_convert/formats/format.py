"""What a quantization format is, beside its arithmetic. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Algorithm = str
"""A format as presets and commands name it: the name of its folder."""
Weights = Literal["max", "sweep", "sweep-weighted", "gptq"]
"""How a base is quantized: scales by largest magnitudes, or block scales by least squared error, which a calibration
may weigh by the mean square of each input channel; and under these, codes by GPTQ."""
WEIGHTS_WORDS: Mapping[Weights, str] = {
    "max": "max",
    "sweep": "a sweep of block scales",
    "sweep-weighted": "a sweep weighted by a calibration",
    "gptq": "GPTQ under a sweep weighted by a calibration",
}
"""The same in words, to be put behind "by"."""


@dataclass(frozen=True, slots=True)
class Format:
    """A quantization format that mopt reads and writes.

    Attributes:
        algorithm: The name that presets and commands have for it.
        bits: Bits of a code; formats are listed in that order.
        quant_algo: The name that config.json has for it.
        packed_dtype: safetensors dtype of a quantized weight.
        min_gpu: The smallest GPU that multiplies in the format, as presets have it.
        words: What the format is, for the model card.
        stored: How the format's tensors lie, for the model card.
        declared: Keys of ``quantization_config`` that say how the tensors are to be read.
        dynamic: Keys that a checkpoint without input scales has, with the method by which engines scale the inputs.
        block_size: Columns per block scale; None without block scales.
        tensor_scale: Role of the scale of the whole weight.
        scales: Roles of all scales of a calibrated module.
        export_flags: The flags of ModelOpt's quantize.py that make an export in this format.
        export_format: The value of ``--format`` there.
        command: The command of mopt that takes such an export.
        max_error: Largest relative error of a module whose codes are not reproduced.
        older: What to do where an export seems to hold no weight of this format; empty if there is nothing to do.
    """

    algorithm: Algorithm
    bits: int
    quant_algo: str
    packed_dtype: str
    min_gpu: str
    words: str
    stored: str
    declared: Mapping[str, Any]
    dynamic: Mapping[str, Any]
    block_size: int | None
    tensor_scale: str
    scales: tuple[str, ...]
    export_flags: str
    export_format: str
    command: str
    max_error: float
    older: str = ""


def entry(room: str, algorithm: Algorithm) -> Any:
    """What a room knows of a format; the room is a package whose modules are named after formats."""
    return import_module(f"{room}.{algorithm}").ENTRY
