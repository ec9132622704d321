"""ModelOpt's FP8 modules: which tensors belong together, by dtype and shape. Pure, no torch.

Per Linear of shape [N, K] (modelopt/torch/export/quant_utils.py, ``to_quantized_weight``):

================  ============  ========  ==============================
tensor            dtype         shape     meaning
================  ============  ========  ==============================
``weight``        F8_E4M3       [N, K]    weight / weight_scale
``weight_scale``  F32           []        weight amax / 448
``input_scale``   F32           []        activation amax / 448
================  ============  ========  ==============================

Before ModelOpt 0.42 the weight stayed in the model's dtype, and the two amax lay in a ``.pt`` beside the export.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.modelopt.export import (
    SCALE_ROLES,
    SCALE_SHAPES,
    PackedModule,
    group_modules,
    missing_scale,
)
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.run.errors import InputError

E4M3_MAX = 448.0
FP8_ROLES = ("weight_scale", "input_scale")
_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}
_PACKED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "U8", "I8"})


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


# By module, then by role.
Calibration = Mapping[str, Mapping[str, Amax]]


def find_fp8_modules(
    tensors: Mapping[str, TensorInfo], calibration: Calibration, ignore: object, *, path: str
) -> dict[str, PackedModule]:
    """Group an export's tensors into quantized modules, judged by dtype and shape.

    Args:
        tensors: All of the export.
        calibration: What a ``--checkpoint`` knows; empty without one.
        ignore: The export's own ``ignore``. It is asked only where no weight is E4M3 yet: which modules are to be
            quantized is then said nowhere else, since the ``.pt`` holds the amax of all. One that lacks its amax there
            is at fault.
        path: The export's folder, for messages.

    Returns:
        Quantized modules by name. Unquantized tensors are in none of them.

    Raises:
        InputError: ``export.transformed``, ``export.mixed`` or ``export.weight``.
    """
    grouped = group_modules(tensors, path=path)
    if any("weight" in roles and roles["weight"].dtype == "F8_E4M3" for roles in grouped.values()):
        quantized = [
            module
            for module, roles in grouped.items()
            if any(role in roles for role in SCALE_ROLES)
            or ("weight" in roles and roles["weight"].dtype in _PACKED_DTYPES)
        ]
    else:
        quantized = [module for module, roles in grouped.items() if any(role in roles for role in SCALE_ROLES)]
        if calibration:
            linears = [
                module for module, roles in grouped.items() if "weight" in roles and len(roles["weight"].shape) == 2
            ]
            left = ignored(ignore, linears, path=f"{path}/config.json")
            quantized += [module for module in linears if module not in left]
    return {module: _fp8_module(module, grouped[module], calibration, path) for module in quantized}


def _fp8_module(module: str, roles: Mapping[str, TensorInfo], calibration: Calibration, path: str) -> PackedModule:
    weight = roles.get("weight")
    calibrated = calibration.get(module, {})
    where = f"{path}/{(weight or next(iter(roles.values()))).file}"
    allowed = HALF_AND_FLOAT | {"F8_E4M3"} if calibration else {"F8_E4M3"}
    if weight is None or weight.dtype not in allowed or len(weight.shape) != 2 or 0 in weight.shape:
        found = f"{weight.dtype} {list(weight.shape)}" if weight else "no weight"
        raise InputError(
            f"{where}: tensor {module + '.weight'!r}: expected F8_E4M3 [N, K] beside its scales, found {found}",
            code="export.mixed" if weight is not None and weight.dtype in _PACKED_DTYPES else "export.weight",
            path=where,
            hint="this module is not FP8; export again with one algorithm for all modules",
        )
    if "weight_scale_2" in roles:
        raise InputError(
            f"{where}: tensor {module + '.weight_scale_2'!r}: expected one scale per weight, found a second",
            code="export.mixed",
            path=where,
            hint="this module is not plain FP8; export again with one algorithm for all modules",
        )
    scales = {role: roles[role] for role in FP8_ROLES if role in roles}
    known = {role: calibrated[role].scale for role in FP8_ROLES if role in calibrated and role not in scales}
    return PackedModule(
        module, *weight.shape, weight, scales, roles.get("bias"), _scale_fault(module, scales, known, where), known
    )


def _scale_fault(
    module: str, scales: Mapping[str, TensorInfo], known: Mapping[str, float], where: str
) -> InputError | None:
    for role in FP8_ROLES:
        if role in known:
            if not 0.0 < known[role] < float("inf"):
                return InputError(
                    f"{where}: {module}: expected a finite positive {role} in the checkpoint, found {known[role]}",
                    code="export.unusable_scale",
                    path=where,
                    hint=f"the module was all zero or never calibrated; quantize again, or --keep-bf16 '{module}'",
                )
            continue
        if role not in scales:
            return missing_scale(module, role, "F32 []", where)
        info = scales[role]
        if info.dtype != "F32" or info.shape not in SCALE_SHAPES:
            return InputError(
                f"{where}: tensor {info.name!r}: expected F32 [], found {info.dtype} {list(info.shape)}"
                + (" (a scale per row)" if len(info.shape) == 1 else ""),
                code="export.shape",
                path=where,
                hint="the runtime takes one scale per weight; export again with --format fp8",
            )
    return None
