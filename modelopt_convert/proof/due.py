"""What is still to be compared: plain data, which travels to whoever writes the module. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from modelopt_convert.checkpoint.calibration import StoredCompensation
from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import Reading
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.layout import Layout
from modelopt_convert.plan.plan import Origin


@dataclass(frozen=True, slots=True)
class Due:
    """A comparison that is due; plain data, so that it can be done anywhere.

    Attributes:
        module: What is compared.
        casts: The dtypes that the exporter may have quantized from, the likeliest first.
        scale: The scale of the whole tensor.
        max_error: Limit of the relative error of a weight that is near.
        reading: NVFP4: how the module lies, as it is declared or as sampled rows tell; it is tried first.
        rule: FP8: how the exporter divided, likewise.
        importance: NVFP4: the weight of each input channel in a calibration, float32 [K]; empty without one.
        compensation: NVFP4: where a calibration has what GPTQ needs; None without it.
    """

    algorithm: Algorithm
    module: PackedModule
    casts: tuple[str, ...]
    scale: float
    max_error: float
    reading: Layout | None = None
    rule: str | None = None
    importance: bytes = field(default=b"", repr=False)
    compensation: StoredCompensation | None = None

    def block_scales(self) -> list[TensorInfo]:
        """The scales that are written as the weight's layout says: none where the format has one layout."""
        return [info for role, info in self.module.scales.items() if role == "weight_scale" and len(info.shape) == 2]


def due_readings(due: Mapping[str, Due], role: Origin, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """What comparisons read of one input.

    Args:
        due: By module.
        role: Which input.
        tensors: Its tensors.
    """
    for one in due.values():
        for info in (one.module.weight, *one.block_scales()) if role == "export" else (one.module.weight,):
            yield info.name, 0, tensors[info.name].num_bytes
