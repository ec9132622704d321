"""What the bytes of a packed module tell ``mopt inspect`` without a base: odd scales, and a hint. No torch."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.nvfp4.stored import all_positive, read_scales
from modelopt_convert.inspection.lint import OddScales
from modelopt_convert.proof.scale_hint import hint_scale_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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

    def odd_scales(self) -> OddScales:
        """Block scales that are NaN, negative or zero, counted."""
        import numpy as np

        stored = np.frombuffer(self.raw, np.uint8).reshape(self.packed.scales["weight_scale"].shape)
        if all_positive(stored):
            return OddScales(nan=0, negative=0, zero=0)
        nan = (stored & 0x7F) == 0x7F
        negative = (stored > 0x80) & ~nan
        unusable = np.argwhere(nan if nan.any() else negative)
        return OddScales(
            nan=int(np.count_nonzero(nan)),
            negative=int(np.count_nonzero(negative)),
            zero=min((int(np.count_nonzero(one == 0)) for one in self.readings.values()), default=0),
            first=f"first at {unusable[0].tolist()}" if len(unusable) else "",
        )

    def hint(self) -> ScaleOrder:
        """The order of the scales, by what one tile of rows says."""
        import numpy as np

        packed = self.packed
        if not self.readings:
            return "undetermined"
        # One tile of rows: both orders keep a scale within its tile of 128 rows.
        top = packed.rows // 2 // ROW_TILE * ROW_TILE
        height = min(ROW_TILE, packed.rows - top)
        stored_half = packed.weight.shape[1]
        raw = self.reader.read_range(packed.weight.name, top * stored_half, height * stored_half)
        codes = np.frombuffer(raw, np.uint8).reshape(height, stored_half)[:, : packed.columns // 2]
        return hint_scale_order(codes, {order: scale[top : top + height] for order, scale in self.readings.items()})

    @functools.cached_property
    def readings(self) -> "dict[ScaleOrder, NDArray[np.uint8]]":
        """The scales [N, K/16] by the orders in which they may lie."""
        shape = self.packed.scales["weight_scale"].shape
        return read_scales(self.raw, shape, self.packed.rows, self.packed.columns // BLOCK_SIZE)
