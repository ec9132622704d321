"""The order of a packed weight's block scales, guessed from the weight's own statistics. Pure, by numpy, no torch."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelopt_convert.formats.floats import values_of
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Readings = Mapping[ScaleOrder, NDArray[np.uint8]]


def hint_scale_order(packed: "NDArray[np.uint8]", readings: "Readings") -> ScaleOrder:
    """Guess the order of the scales without a base.

    In a quantized weight a block's scale and the energy of its codes are anti-correlated once rows and columns are
    centred: a block whose amax is an outlier has small codes elsewhere. In the wrong order there is no such relation.

    Args:
        packed: uint8 [R, K/2], some rows.
        readings: E4M3 bytes [R, K/16] of the same rows, by order.
    """
    import numpy as np

    both: tuple[ScaleOrder, ...] = ("linear", "128x4")
    orders = [order for order in both if order in readings]
    if len(orders) == 1:
        return orders[0]
    if np.array_equal(readings["linear"], readings["128x4"]):
        return "equivalent"
    codes = np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(len(packed), -1, BLOCK_SIZE)
    energy = np.sqrt(np.square(values_of("F4")[codes]).mean(axis=-1))
    # A zero scale over codes that are not zero cannot be meant.
    possible = [order for order in orders if not _zero_over_codes(readings[order], energy)]
    if len(possible) == 1:
        return possible[0]
    correlations = {order: _correlation(readings[order], energy) for order in orders}
    best = min(orders, key=lambda order: correlations[order])
    other = max(correlations.values())
    mine = correlations[best]
    clear = mine < -0.05 and (other - mine) * math.sqrt(energy.size) > 8 and mine < 2 * min(other, 0.0)
    return best if clear else "undetermined"


def _zero_over_codes(scale: "NDArray[np.uint8]", energy: "NDArray[np.float32]") -> bool:
    # ModelOpt up to 0.44 let scales underflow to zero; all codes of such a block are saturated.
    return bool(((scale == 0) & (energy > 0) & (energy < 6.0)).any())


def _correlation(scale: "NDArray[np.uint8]", energy: "NDArray[np.float32]") -> float:
    import numpy as np

    factors = values_of("F8_E4M3")[scale].astype(np.float64)
    usable = (factors > 0) & (energy > 0)
    left, right = (
        _centred(np.log2(np.where(usable, values, 1.0)), usable) for values in (factors, energy.astype(np.float64))
    )
    # Not by linalg: BLAS would open threads of its own, one for each core and worker.
    norm = math.sqrt(float(np.square(left).sum()) * float(np.square(right).sum()))
    return float((left * right).sum()) / norm if norm > 0 else 0.0


def _centred(values: "NDArray[np.float64]", usable: "NDArray[np.bool_]") -> "NDArray[np.float64]":
    """Less the means of its row and of its column, unusable places at zero."""
    import numpy as np

    weight = usable.astype(np.float64)
    for _ in range(3):  # with gaps one pass of each does not centre exactly
        for axis in (0, 1):
            counts = np.maximum(weight.sum(axis=axis, keepdims=True), 1.0)
            values = (values - (values * weight).sum(axis=axis, keepdims=True) / counts) * weight
    return values
