"""What the bytes of a packed module tell ``mopt inspect``: odd scales, its layout by the base, a hint without."""

from dataclasses import dataclass

import torch

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.scales import all_positive, scale_readings
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import first_place, from_bytes
from modelopt_convert.inspection.lint import OddScales
from modelopt_convert.proof.detector import Detection, detect_with_base, hint_scale_order, telling_rows


@dataclass(frozen=True)
class ModuleBytes:
    """One packed module whose block scales are read.

    Attributes:
        reader: Its checkpoint.
        packed: The module.
        raw: All its block scales.
    """

    reader: CheckpointReader
    packed: PackedModule
    raw: bytes

    @torch.inference_mode()
    def odd_scales(self) -> OddScales:
        """Block scales that are NaN, negative or zero, counted."""
        stored = from_bytes(self.raw, "U8", (-1,))
        if all_positive(stored):
            return OddScales(nan=0, negative=0, zero=0)
        readings = self._readings()
        nan = ((stored & 0x7F) == 0x7F).view(self.packed.scales["weight_scale"].shape)
        negative = (stored > 0x80).view(nan.shape) & ~nan
        unusable = nan if bool(nan.any()) else negative
        return OddScales(
            nan=int(nan.count_nonzero()),
            negative=int(negative.count_nonzero()),
            zero=min((int((one.view(torch.uint8) == 0).count_nonzero()) for one in readings.values()), default=0),
            first=first_place(unusable) if bool(unusable.any()) else "",
        )

    @torch.inference_mode()
    def against(
        self, base: CheckpointReader, info: TensorInfo, global_scale: float, max_error: float
    ) -> Detection | None:
        """The layout, by sampled rows of the weight ``info`` in the base; None if the shapes allow no reading."""
        packed, readings = self.packed, self._readings()
        if not readings:
            return None
        rows = sorted({*sample_rows(packed.rows, SAMPLED_ROWS), *telling_rows(readings, 4)})
        half, row_bytes = packed.columns // 2, info.num_bytes // packed.rows
        codes = self.reader.read_rows(packed.weight.name, rows, packed.weight.shape[1], half)
        base_bytes = base.read_rows(info.name, rows, row_bytes)
        base_rows = from_bytes(base_bytes, info.dtype, (len(rows), packed.columns))
        dtypes = (torch.bfloat16, torch.float16, base_rows.dtype)
        return detect_with_base(
            [base_rows, *(base_rows.to(dtype) for dtype in dict.fromkeys(dtypes) if dtype != base_rows.dtype)],
            from_bytes(codes, "U8", (len(rows), half)),
            readings,
            rows,
            torch.tensor(global_scale, dtype=torch.float32),
            max_error=max_error,
        )

    @torch.inference_mode()
    def hint(self) -> ScaleOrder:
        """The order of the scales, by what one tile of rows says."""
        packed, readings = self.packed, self._readings()
        if not readings:
            return "undetermined"
        # One tile of rows: both orders keep a scale within its tile of 128 rows.
        top = packed.rows // 2 // ROW_TILE * ROW_TILE
        height = min(ROW_TILE, packed.rows - top)
        stored_half = packed.weight.shape[1]
        raw = self.reader.read_range(packed.weight.name, top * stored_half, height * stored_half)
        codes = from_bytes(raw, "U8", (height, stored_half))[:, : packed.columns // 2].contiguous()
        return hint_scale_order(codes, {order: scale[top : top + height] for order, scale in readings.items()})

    def _readings(self) -> dict[ScaleOrder, torch.Tensor]:
        stored = from_bytes(self.raw, "F8_E4M3", self.packed.scales["weight_scale"].shape)
        return scale_readings(stored, self.packed.rows, self.packed.columns // BLOCK_SIZE)
