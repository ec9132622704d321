"""What a calibration says of modules, beside their export: the amax of weights and inputs. Pure, no torch."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_convert.formats.dtypes import E4M3_MAX

_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}


@dataclass(frozen=True, slots=True)
class Amax:
    """A calibrated amax.

    Attributes:
        value: As float32.
        dtype: safetensors name of the dtype that it was stored in: it is only known that well.
    """

    value: float
    dtype: str

    @property
    def scale(self) -> float:
        """``amax / 448`` in float32, as ModelOpt and SGLang form it.

        A quotient of two float32 values, rounded to float64 and then to float32, is the one rounded to float32 at once.
        """
        return float(struct.unpack("<f", struct.pack("<f", self.value / E4M3_MAX))[0])

    def agrees(self, scale: float) -> bool:
        """Whether a scale is that of this amax, to 1e-6, or as near as the amax's own dtype can tell."""
        rounding = 2.0 ** (math.frexp(self.value)[1] - _MANTISSA_BITS[self.dtype] - 2)  # half a step of the dtype
        return abs(scale * E4M3_MAX - self.value) <= max(1e-6 * self.value, rounding)


# By module, then by the role of the scale that it makes.
Calibration = Mapping[str, Mapping[str, Amax]]
