"""NVFP4 modules in L0 and L1: padding, zero scales, and what the scales say of their own order."""

from collections.abc import Mapping, Sequence

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.codes import unpack_e2m1
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.scales import all_positive, scale_readings
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.detector import hint_scale_order
from modelopt_convert.proof.fused import fused_losses
from modelopt_convert.proof.tensors import load, load_weight
from modelopt_convert.verification.levels.container import StoredFormat
from modelopt_convert.verification.subject import Subject


class _Nvfp4Stored:
    fatal: frozenset[str] = frozenset()  # NVFP4 is recognised by its tensors, whatever ``ignore`` says
    one_layout = ""

    def stored_faults(self, subject: Subject, module: PackedModule) -> list[str]:
        with torch.inference_mode():  # of each thread
            stored = load(subject.reader, module.scales["weight_scale"].name)
            if stored.shape == (module.rows, module.columns // BLOCK_SIZE) and all_positive(stored):
                return _padding_of_weight(subject, module)
            readings = scale_readings(stored, module.rows, module.columns // BLOCK_SIZE)
            padding = [] if readings else [f"{module.name}: the padding of weight_scale is not zero"]
            return padding + _padding_of_weight(subject, module) + _zero_faults(subject, module, readings)

    def hint(self, subject: Subject, module: PackedModule) -> ScaleOrder:
        readings = _readings(subject, module)
        if not readings:
            return "undetermined"
        top = module.rows // 2 // ROW_TILE * ROW_TILE
        height = min(ROW_TILE, module.rows - top)
        rows = {order: scale[top : top + height] for order, scale in readings.items()}
        return hint_scale_order(_codes(subject, module, list(range(top, top + height))), rows)

    def fused_losses(self, reader: CheckpointReader, group: Sequence[str]) -> Mapping[str, float]:
        return fused_losses(reader, group)


ENTRY: StoredFormat = _Nvfp4Stored()


def _readings(subject: Subject, module: PackedModule) -> dict[ScaleOrder, torch.Tensor]:
    stored = load(subject.reader, module.scales["weight_scale"].name)
    return scale_readings(stored, module.rows, module.columns // BLOCK_SIZE)


def _codes(subject: Subject, module: PackedModule, rows: list[int]) -> torch.Tensor:
    """Packed codes of some rows, without padding."""
    stored, half = module.weight.shape[1], module.columns // 2
    raw = subject.reader.read_rows(module.weight.name, rows, stored, half)
    return from_bytes(raw, "U8", (len(rows), half))


def _padding_of_weight(subject: Subject, module: PackedModule) -> list[str]:
    if module.weight.shape == (module.rows, module.columns // 2):
        return []
    stored = load_weight(subject.reader, module.weight.name)
    if bool(stored[module.rows :].any()) or bool(stored[:, module.columns // 2 :].any()):
        return [f"{module.name}: the padding of weight is not zero"]
    return []


def _zero_faults(subject: Subject, module: PackedModule, readings: Mapping[ScaleOrder, torch.Tensor]) -> list[str]:
    """Zero scales over codes that are neither zero nor saturated: no quantizer makes these.

    ModelOpt up to 0.44 let scales underflow to zero; all codes of such a block are saturated.
    """
    reading = readings.get(subject.layout.scales)
    if reading is None:
        return []
    zero = (reading.view(torch.uint8) & 0x7F) == 0
    count, first = 0, ""
    for row in zero.any(dim=1).nonzero().flatten().tolist():
        codes = unpack_e2m1(_codes(subject, module, [row]))[0].view(-1, BLOCK_SIZE) & 0x07
        meant = (codes == 0).all(dim=1) | (codes == 7).all(dim=1)
        wrong = zero[row] & ~meant
        if not first and bool(wrong.any()):
            first = f"first at [{row}, {int(wrong.nonzero()[0])}]"
        count += int(wrong.sum())
    return [f"{module.name}: {count} block scales are zero over codes that are not, {first}"] if count else []
