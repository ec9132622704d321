"""NVFP4 modules as they are stored: padding, zero scales, what scales say of their order; rows decoded. No torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.reader import MAX_READ_BYTES, CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.floats import values_of
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.nvfp4.stored import all_positive, read_scales
from modelopt_convert.proof.scale_hint import hint_scale_order
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.verification.levels.container import StoredFormat
from modelopt_convert.verification.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Readings = Mapping[ScaleOrder, NDArray[np.uint8]]


class _Nvfp4Stored:
    fatal: frozenset[str] = frozenset()  # NVFP4 is recognised by its tensors, whatever ``ignore`` says
    one_layout = ""

    def stored_faults(self, subject: Subject, module: PackedModule) -> list[str]:
        import numpy as np

        info = module.scales["weight_scale"]
        raw = subject.reader.read(info.name)
        if info.shape == (module.rows, module.columns // BLOCK_SIZE) and all_positive(np.frombuffer(raw, np.uint8)):
            return _padding_of_weight(subject, module)
        readings = read_scales(raw, info.shape, module.rows, module.columns // BLOCK_SIZE)
        padding = [] if readings else [f"{module.name}: the padding of weight_scale is not zero"]
        return padding + _padding_of_weight(subject, module) + _zero_faults(subject, module, readings)

    def decoded(self, subject: Subject, module: PackedModule, rows: Sequence[int]) -> "NDArray[np.float32]":
        import numpy as np

        readings, order = _readings(subject, module), subject.layout.scales
        if order not in readings:
            stored = list(module.scales["weight_scale"].shape)
            raise ValueError(f"scales {stored} cannot be read as {order}")
        packed = _codes(subject, module, rows)
        tensor_scale(subject.reader, module, FORMAT.tensor_scale)
        both = (packed & 0x0F, packed >> 4)
        codes = np.stack(both if subject.layout.nibbles == "low" else both[::-1], axis=-1)
        factors = values_of("F8_E4M3")[readings[order][list(rows)]]
        return values_of("F4")[codes].reshape(len(rows), -1) * np.repeat(factors, BLOCK_SIZE, axis=1)

    def hint(self, subject: Subject, module: PackedModule) -> ScaleOrder:
        readings = _readings(subject, module)
        if not readings:
            return "undetermined"
        top = module.rows // 2 // ROW_TILE * ROW_TILE
        height = min(ROW_TILE, module.rows - top)
        rows = {order: scale[top : top + height] for order, scale in readings.items()}
        return hint_scale_order(_codes(subject, module, list(range(top, top + height))), rows)

    def fused_losses(self, reader: CheckpointReader, group: Sequence[str]) -> Mapping[str, float]:
        from modelopt_convert.proof.fused import fused_losses

        return fused_losses(reader, group)


ENTRY: StoredFormat = _Nvfp4Stored()


def _readings(subject: Subject, module: PackedModule) -> "Readings":
    info = module.scales["weight_scale"]
    return read_scales(subject.reader.read(info.name), info.shape, module.rows, module.columns // BLOCK_SIZE)


def _codes(subject: Subject, module: PackedModule, rows: Sequence[int]) -> "NDArray[np.uint8]":
    """Packed codes of some rows, without padding."""
    import numpy as np

    stored, half = module.weight.shape[1], module.columns // 2
    raw = subject.reader.read_rows(module.weight.name, rows, stored, half)
    return np.frombuffer(raw, np.uint8).reshape(len(rows), half)


def _padding_of_weight(subject: Subject, module: PackedModule) -> list[str]:
    import numpy as np

    if module.weight.shape == (module.rows, module.columns // 2):
        return []
    raw = subject.reader.read(module.weight.name, limit=MAX_READ_BYTES)
    stored = np.frombuffer(raw, np.uint8).reshape(module.weight.shape)
    if stored[module.rows :].any() or stored[:, module.columns // 2 :].any():
        return [f"{module.name}: the padding of weight is not zero"]
    return []


def _zero_faults(subject: Subject, module: PackedModule, readings: "Readings") -> list[str]:
    """Zero scales over codes that are neither zero nor saturated: no quantizer makes these.

    ModelOpt up to 0.44 let scales underflow to zero; all codes of such a block are saturated.
    """
    import numpy as np

    reading = readings.get(subject.layout.scales)
    if reading is None:
        return []
    zero = (reading & 0x7F) == 0
    count, first = 0, ""
    for row in np.flatnonzero(zero.any(axis=1)).tolist():
        packed = _codes(subject, module, [row])[0]
        magnitudes = np.stack((packed & 0x07, packed >> 4 & 0x07), axis=-1).reshape(-1, BLOCK_SIZE)
        meant = (magnitudes == 0).all(axis=1) | (magnitudes == 7).all(axis=1)
        wrong = np.flatnonzero(zero[row] & ~meant)
        if not first and len(wrong):
            first = f"first at [{row}, {wrong[0]}]"
        count += len(wrong)
    return [f"{module.name}: {count} block scales are zero over codes that are not, {first}"] if count else []
